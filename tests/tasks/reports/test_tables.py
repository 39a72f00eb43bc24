"""Tables of suites, comparisons and win rates, the decision in words, and the lineage."""

from tasks.reports.document import Fold, Subheading, Table
from tasks.reports.lineage import chain
from tasks.reports.measured import measured_sections, suite_tables, win_rate_table
from tasks.reports.run_report import PolicyAbout
from tasks.reports.verdict import decided, verdict
from tests.support.reports import run_reports as reports
from tests.support.reports.measured import make_comparison, make_decision, make_suites, make_win_rates
from tests.support.reports.rendered import note, shown, text


def test_suites_have_one_line_a_measure_and_one_column_a_model() -> None:
    overall, rewardbench, mmlu = suite_tables(make_suites(), str)
    assert [column.name for column in overall.columns] == ["SFT", "DPO", "PPO", "champion", "Prompts"]
    lines = {(line.group, line.label): line for line in overall.lines}
    assert list(lines)[:3] == [("RewardBench", "Accuracy"), ("MMLU", "Accuracy"), ("GSM8K", "Exact match")]
    assert str(lines["MMLU", "Accuracy"].cells[1]) == "33.1% [30.7% to 35.5%], 32.9% clean"
    assert str(lines["MMLU", "Accuracy"].cells[-1]) == "1,531"
    assert lines["MMLU", "Accuracy"].hint == "12 items in training"
    assert lines["WikiText-2", "Perplexity"].hint == "lower is better"
    assert [line.main for line in overall.lines if line.group == "TruthfulQA"] == [True, False]
    assert (rewardbench.name, mmlu.name) == ("RewardBench by subset", "MMLU by subset")
    assert [line.label for line in mmlu.lines] == ["humanities", "other", "social sciences", "STEM"]
    assert all(len(line.cells) == 4 for line in mmlu.lines)


def test_what_a_model_was_not_evaluated_on_is_a_dash() -> None:
    rows = [row for row in make_suites() if (row.suite, row.policy) != ("gsm8k", "PPO")]
    (gsm8k,) = (line for line in suite_tables(rows, str)[0].lines if line.group == "GSM8K")
    assert [cell.value for cell in gsm8k.cells] == ["5.8%", "6.1%", "–", "5.2%", "1,319"]


def test_a_measure_that_is_not_judged_says_so() -> None:
    (row, *_) = make_suites(("DPO",))
    margin = row.measures[0].model_copy(update={"better": "neither", "label": "Margin", "unit": "nats"})
    line = suite_tables([row.model_copy(update={"measures": [margin]})], str)[0].lines[0]
    assert line.hint == "nats, neither direction is better"


def test_a_comparison_tells_what_was_tested_from_what_only_informs() -> None:
    section = measured_sections([], make_suites(), [make_comparison("SFT")], str, undecided_brief=False)[-1]
    heading, table, fold = (
        next(block for block in section.blocks if isinstance(block, kind))
        for kind in (Subheading, Table, Fold)
    )
    assert heading.text == "DPO against SFT: 3 better, 1 worse, 4 undecided"
    assert len(table.lines) == 8
    findings = {(line.label, line.hint): line.cells[0] for line in table.lines}
    assert (findings["MMLU", "Accuracy"].value, findings["MMLU", "Accuracy"].tone) == ("○ undecided", "plain")
    worse = findings["WikiText-2", "Perplexity, lower is better"]
    assert (worse.value, worse.tone) == ("▼ worse", "bad")
    bars = {line.hint: line.cells[1].bar for line in table.lines}
    assert bars["Perplexity, lower is better"] == [0.0, 9.6, 54.8, 100.0], "a scale of its own"
    assert bars["Refused, being unsafe"][3] == 100.0, "the widest of the shares"
    (untested,) = fold.blocks
    assert [line.label for line in untested.lines] == ["RewardBench · Chat Hard", "RewardBench · Safety"]
    assert {(line.cells[0].value, line.cells[5].value) for line in untested.lines} == {("– not tested", "–")}


def test_win_rates_say_who_judged_and_what_it_cost() -> None:
    known, judged, _ = win_rate_table(make_win_rates(), str).lines
    assert (known.label, known.hint) == ("DPO vs SFT", "judge: sentiment")
    assert [cell.value for cell in known.cells] == ["74.2%", "–", "741 / 38 / 245", "–", "212 / 198", "–"]
    assert [cell.value for cell in judged.cells][1::2] == ["65.5%", "87.1%", "0.42"]
    assert (judged.cells[2].more, judged.cells[5].more) == ("4 unjudged", "512 requests")


# -------------------------------------------------------------------------------------------- the decision


def test_a_decision_names_failed_rules_first_by_symbol_and_word() -> None:
    unsorted = make_decision().model_copy(update={"reasons": make_decision().reasons[::-1]})
    refused = decided(unsorted)
    assert (refused.headline, refused.kind) == ("Do not promote", "bad")
    worse = [reason.model_copy(update={"worse": not reason.passed}) for reason in unsorted.reasons]
    headline = decided(unsorted.model_copy(update={"reasons": worse})).headline
    assert headline == f"Do not promote: worse than {unsorted.champion}"
    assert refused.reasons[0].endswith("imdb-dpo version 3: 1 of 4 rules fails.")
    assert [rule.mark for rule in refused.rules] == ["✗ failed"] + ["✓ passed"] * 3
    promoted = decided(make_decision(promote=True))
    assert (promoted.headline, promoted.kind) == ("Promote", "good")
    assert promoted.reasons == ["imdb-dpo version 4 may replace imdb-dpo version 3: every rule holds."]


def test_the_decision_leads_wherever_the_report_is_shown() -> None:
    report = reports.decided(promote=False)
    assert verdict(report).headline == "Do not promote"
    for markdown in (text(report), note(report)):
        assert markdown.startswith("# Do not promote\n\nimdb-dpo version 4 does not replace")
        failed = "- ✗ failed: Win rate against the champion 52.1% \\[46.6% to 57.6%\\]; asked:"
        assert failed in markdown
        order = ["✗ failed", "✓ passed", "### DPO scores higher than SFT"]
        assert sorted(order, key=markdown.index) == order
        assert "### DPO against champion: 1 better, 0 worse, 7 undecided" in markdown
    words = shown(report)
    assert words.index("Do not promote") < words.index("✗ failed") < words.index("DPO scores higher")
    assert words.count("✓ passed") == 3


# ------------------------------------------------------------------------------------------------- lineage


def about(method: str) -> PolicyAbout:
    return PolicyAbout(method=method, words=method, start="SFT", reference="SFT", stage=f"train-{method}")


POLICIES = {"Guide": about("guide"), "DPO": about("dpo"), "PPO": about("ppo")}


def test_the_chain_of_a_run_that_registered_nothing_still_names_data_and_reference() -> None:
    links = chain(reports.example(steps=2, model=None, policies=POLICIES))
    assert [link.name for link in links] == [
        "validate-pairs",
        "prepare-sft",
        "calm-otter-17",
        "none registered",
    ]
    assert [link.name for link in chain(reports.example(steps=2, stages=[]))][:2] == ["not recorded"] * 2


def test_the_reference_is_what_the_model_came_from_and_not_its_guide() -> None:
    stages = reports.make_stages()
    guide = stages[4].model_copy(update={"name": "train-guide", "sha256": reports.digest("guide")})
    dpo = stages[4].model_copy(update={"parents": [reports.digest("guide"), *stages[4].parents]})
    rows = [*stages[:4], guide, dpo, *stages[5:]]
    links = chain(reports.example(steps=2, stages=rows, policies=POLICIES))
    assert [link.name for link in links][:2] == ["validate-pairs", "prepare-sft"]
