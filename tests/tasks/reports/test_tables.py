"""Tables of suites, comparisons and win rates, and the decision in words."""

import io

from rich.console import Console
from rich.table import Table

from dpo_core.statistics.estimates import Estimate
from tasks.reports.format import measured, p_value
from tasks.reports.lineage import chain
from tasks.reports.run_report import PolicyAbout
from tasks.reports.run_text import markdown as run_markdown
from tasks.reports.run_text import note
from tasks.reports.run_text import terminal_table as run_table
from tasks.reports.tables import comparison_table, outcome, suite_table, win_rate_lines
from tasks.reports.verdict import decided, verdict
from tests.support.reports import run_reports as reports
from tests.support.reports.measured import make_comparison, make_decision, make_suites, make_win_rates


def _shown(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=80, color_system=None).print(table)
    return out.getvalue()


def test_a_share_is_in_percent_and_its_difference_in_points() -> None:
    value = Estimate(value=0.0312, low=-0.0049, high=0.067, n=9)
    assert str(measured(value, "share")) == "3.1% [-0.5% to 6.7%]"
    assert str(measured(value, "share", difference=True)) == "+3.1 pp [-0.5 to +6.7]"
    assert str(measured(value, "mean", difference=True)) == "+0.0312 [-0.0049 to +0.0670]"
    assert (p_value(0.0004), p_value(0.0316), p_value(1.0)) == ("< 0.001", "0.032", "1.000")


def test_the_suites_stand_one_line_a_measure_and_one_column_a_model() -> None:
    table = suite_table(make_suites())
    assert table.head == ["SFT", "DPO", "PPO", "champion", "Prompts"]
    lines = {(line.label, line.hint): line.cells for line in table.lines}
    assert list(lines)[:3] == [("RewardBench", "Accuracy"), ("MMLU", "Accuracy"), ("GSM8K", "Exact match")]
    mmlu = lines["MMLU", "Accuracy"]
    assert (str(mmlu[1]), mmlu[1].more) == ("33.1% [30.7% to 35.5%]", "32.9% clean")
    assert (mmlu[-1].value, mmlu[-1].more) == ("1,531", "12 items in training")
    assert lines["WikiText-2", "Perplexity, lower is better"][0].value == "18.4"
    assert lines["GSM8K", "Exact match"][0].more == ""
    assert list(table.subsets) == ["RewardBench", "MMLU"]
    assert [line.label for line in table.subsets["MMLU"]] == [
        "humanities",
        "other",
        "social sciences",
        "STEM",
    ]
    assert all(len(line.cells) == 4 for line in table.subsets["MMLU"])


def test_what_a_model_was_not_asked_is_a_dash() -> None:
    rows = [row for row in make_suites() if (row.suite, row.policy) != ("gsm8k", "PPO")]
    rows[0] = rows[0].model_copy(update={"items": 2000})
    table = suite_table(rows)
    (gsm8k,) = (line for line in table.lines if line.label == "GSM8K")
    assert [cell.value for cell in gsm8k.cells] == ["5.8%", "6.1%", "–", "5.2%", "1,319"]
    assert table.lines[0].cells[-1].value == "2,985"


def test_a_comparison_tells_what_was_tested_from_what_only_informs() -> None:
    table = comparison_table(make_comparison("SFT"), make_suites())
    assert table.outcome == "3 better, 1 worse, 4 undecided"
    assert len(table.tested) == 8
    assert [line.label for line in table.informing] == ["RewardBench · Chat Hard", "RewardBench · Safety"]
    findings = {(line.label, line.hint): line.cells[1] for line in table.tested}
    assert (findings["MMLU", "Accuracy"].value, findings["MMLU", "Accuracy"].tone) == ("○ undecided", "plain")
    worse = findings["WikiText-2", "Perplexity, lower is better"]
    assert (worse.value, worse.tone) == ("▼ worse", "bad")
    assert findings["RewardBench", "Accuracy"].value == "▲ better"
    assert {line.cells[1].value for line in table.informing} == {"– not tested"}
    assert {line.cells[5].value for line in table.informing} == {"–"}
    untested = make_comparison("SFT").model_copy(update={"rows": make_comparison("SFT").rows[-2:]})
    assert outcome(untested) == "nothing was tested"


def test_win_rates_say_who_judged_and_what_it_cost() -> None:
    known, judged, _ = win_rate_lines(make_win_rates())
    assert (known.label, known.hint) == ("DPO vs SFT", "judge: sentiment")
    assert [cell.value for cell in known.cells] == ["74.2%", "–", "741 / 38 / 245", "–", "212 / 198", "–"]
    assert [cell.value for cell in judged.cells][1::2] == ["65.5%", "87.1%", "0.42"]
    assert (judged.cells[2].more, judged.cells[5].more) == ("4 unjudged", "512 requests")


# -------------------------------------------------------------------------------------------- the decision


def test_a_decision_names_failed_rules_first_by_symbol_and_word() -> None:
    unsorted = make_decision().model_copy(update={"reasons": make_decision().reasons[::-1]})
    shown = decided(unsorted)
    assert (shown.headline, shown.kind) == ("Do not promote", "bad")
    worse = [reason.model_copy(update={"worse": not reason.passed}) for reason in unsorted.reasons]
    headline = decided(unsorted.model_copy(update={"reasons": worse})).headline
    assert headline == f"Do not promote: worse than {unsorted.champion}"
    assert shown.reasons[0].endswith("imdb-dpo version 3: 1 of 4 rules fails.")
    assert [reason.split(":")[0] for reason in shown.reasons[1:]] == ["✗ failed"] + ["✓ passed"] * 3
    shown = decided(make_decision(promote=True))
    assert (shown.headline, shown.kind) == ("Promote", "good")
    assert shown.reasons[0] == "imdb-dpo version 4 may replace imdb-dpo version 3: every rule holds."


def test_the_decision_leads_wherever_the_report_is_shown() -> None:
    report = reports.decided(promote=False)
    assert verdict(report).headline == "Do not promote"
    for text in (run_markdown(report), note(report, "page.html")):
        assert text.startswith("# Do not promote\n\nimdb-dpo version 4 does not replace")
        failed = "- ✗ failed: Win rate against the champion 52.1% \\[46.6% to 57.6%\\]; asked:"
        assert failed in text
        assert text.index("✗ failed") < text.index("✓ passed") < text.index("**DPO scores higher than SFT**")
        assert "## DPO against champion: 1 better, 0 worse, 7 undecided" in text
    shown = _shown(run_table(report))
    assert shown.index("Do not promote") < shown.index("✗ failed") < shown.index("DPO scores higher")
    assert shown.count("✓ passed") == 3


def test_the_terminal_shows_tasks_comparisons_and_win_rates_in_80_columns() -> None:
    text = _shown(run_table(reports.decided(promote=True)))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for words in (
        "Win rates",
        "Tasks (95% interval)",
        "DPO against champion: 1 better",
        "▲ better",
        "+7.5 pp",
    ):
        assert words in text, words
    assert "○ undecided" not in text, "the end of a run is brief: the title counts them"


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
