"""An evaluation outside a run: its headline, page, Markdown and terminal tables."""

import re

import pytest
from pydantic import ValidationError

from tasks.reports.evaluation_report import EvaluatedModel, EvaluationReport, headline
from tests.support.reports.evaluations import make_evaluation_report
from tests.support.reports.measured import hostile_measured, make_comparison, make_suites
from tests.support.reports.outline import Outline
from tests.support.reports.rendered import page, shown, text
from tests.support.reports.run_reports import HOSTILE


def test_an_evaluation_survives_json_and_needs_a_model() -> None:
    report = make_evaluation_report()
    assert EvaluationReport.model_validate_json(report.model_dump_json()) == report
    with pytest.raises(ValidationError, match="at least 1 item"):
        make_evaluation_report(models=[])


A, B = "A (DPO)", "B (champion)"


@pytest.mark.parametrize(
    ("findings", "words", "kind"),
    [
        (["better", "undecided"], f"{A} is better than {B} on 1 of 2 measures, on 2,985 prompts", "good"),
        (["worse"], f"{A} is worse than {B} on 1 of 1 measure, on 2,985 prompts", "bad"),
        (
            ["better", "worse", "worse"],
            f"{A} is better than {B} on 1 and worse on 2 of 3 measures, on 2,985 prompts",
            "unclear",
        ),
        (["undecided"], f"No difference between {A} and {B} is shown on 2,985 prompts", "unclear"),
        ([], f"The suites could not compare {A} with {B}", "unclear"),
    ],
)
def test_the_headline_counts_what_was_found(findings: list[str], words: str, kind: str) -> None:
    comparison = make_comparison("champion")
    rows = [comparison.rows[0].model_copy(update={"finding": finding}) for finding in findings]
    summary = headline(make_evaluation_report(comparisons=[comparison.model_copy(update={"rows": rows})]))
    assert (summary.text, summary.kind) == (words, kind)


def test_two_models_are_named_by_what_trained_them() -> None:
    models = [EvaluatedModel(name=n, sha256="0", objective=o) for n, o in (("DPO", "kto"), ("champion", ""))]
    report = make_evaluation_report(models=models)
    assert headline(report).text.startswith("A (kto) is better than B (champion) on 1 of 8 measures")
    assert "A (kto) wins 52.1% [46.6% to 57.6%] against B (champion) on 256 prompts, judged" in page(report)


def test_one_model_on_suites_has_no_winner() -> None:
    one = {"models": make_evaluation_report().models[:1], "comparisons": [], "win_rates": []}
    report = make_evaluation_report(suites=make_suites(("DPO",)), **one)
    assert headline(report).text == "Evaluation of DPO"
    assert "MMLU (Accuracy) 33.1% [30.7% to 35.5%]." in headline(report).reasons
    html = page(report)
    assert "Win rates (no judge compared answers); Comparisons (no two models were compared" in html
    assert "6 suites: RewardBench, MMLU, GSM8K, TruthfulQA, XSTest, WikiText-2." in html
    single = make_evaluation_report(suites=make_suites(("DPO",))[:1], **one)
    assert headline(single).text == "DPO: RewardBench (Accuracy) 70.1% [68.4% to 71.8%]"


def test_the_page_of_an_evaluation() -> None:
    report = make_evaluation_report()
    outline = Outline(page(report))
    assert [words for level, words in outline.headings if level < 3] == [
        f"{A} is better than {B} on 1 of 8 measures, on 62 to 2,985 prompts", "Win rates", "Tasks",
        "Comparisons", "Samples", "Models", "Reproduce", "Words",
    ]  # fmt: skip
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert "dpo compare runs/calm-otter-17/dpo models:/imdb-dpo@champion --suites all" in page(report)
    for model in report.models:
        assert model.sha256 in page(report)


def test_an_evaluation_escapes_everything() -> None:
    measures = {k: v for k, v in hostile_measured(HOSTILE).items() if k != "decision"}
    models = [make_evaluation_report().models[0].model_copy(update={"name": HOSTILE})]
    more = {"models": models, "command": HOSTILE, "notes": {HOSTILE: HOSTILE}}
    report = make_evaluation_report(**measures, **more)
    outline = Outline(page(report))
    assert not outline.all("script")
    assert not outline.all("img")
    assert not [k for _, a in outline.tags for k in a if k.startswith("on")]
    outside = text(report).split("## Reproduce")[0]
    assert "<script" not in outside.replace("\\<", "")
    for table in re.findall(r"(?:^\|.*\n)+", outside, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_markdown_and_terminal_of_an_evaluation() -> None:
    report = make_evaluation_report()
    assert text(report).startswith(f"# {A} is better than {B} on 1 of 8 measures")
    assert "| MMLU: Accuracy (12 items in training) | 33.1% \\[30.7% to 35.5%\\], 32.9% clean |" in text(
        report
    )
    assert report.models[1].sha256 in text(report)
    words = shown(report)
    assert max(map(len, words.splitlines())) <= 80
    assert words.count("○ undecided") == 7
    assert "after 13 min 32 s" in words
    assert report.models[1].sha256[:12] in words
