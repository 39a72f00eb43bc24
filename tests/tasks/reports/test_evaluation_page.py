"""An evaluation outside a run: its headline, page, Markdown and terminal tables."""

import io
import re

import pytest
from pydantic import ValidationError
from rich.console import Console

from tasks.reports.evaluation_page import render_evaluation
from tasks.reports.evaluation_report import EvaluationReport, headline, markdown, terminal_table
from tests.support.reports.evaluations import make_evaluation_report
from tests.support.reports.measured import hostile_measured, make_comparison, make_suites
from tests.support.reports.outline import Outline
from tests.support.reports.run_reports import HOSTILE


def test_an_evaluation_survives_json_and_needs_a_model() -> None:
    report = make_evaluation_report()
    assert EvaluationReport.model_validate_json(report.model_dump_json()) == report
    with pytest.raises(ValidationError, match="at least 1 item"):
        make_evaluation_report(models=[])


@pytest.mark.parametrize(
    ("findings", "text", "kind"),
    [
        (["better", "undecided"], "DPO is better than champion on 1 of 2 measures", "good"),
        (["worse"], "DPO is worse than champion on 1 of 1 measure", "bad"),
        (
            ["better", "worse", "worse"],
            "DPO is better than champion on 1 and worse on 2 of 3 measures",
            "unclear",
        ),
        (["undecided"], "No difference between DPO and champion is shown", "unclear"),
        ([], "The suites could not compare DPO with champion", "unclear"),
    ],
)
def test_the_headline_counts_what_was_found(findings: list[str], text: str, kind: str) -> None:
    comparison = make_comparison("champion")
    rows = [comparison.rows[0].model_copy(update={"finding": finding}) for finding in findings]
    summary = headline(make_evaluation_report(comparisons=[comparison.model_copy(update={"rows": rows})]))
    assert (summary.text, summary.kind) == (text, kind)


def test_one_model_on_suites_has_no_winner() -> None:
    report = make_evaluation_report(
        models=make_evaluation_report().models[:1], suites=make_suites(("DPO",)), comparisons=[], win_rates=[]
    )
    assert headline(report).text == "Evaluation of DPO"
    page = render_evaluation(report)
    assert "Win rates (no judge compared answers); Comparisons (no two models were compared" in page
    assert "6 suites: RewardBench, MMLU, GSM8K, TruthfulQA, XSTest, WikiText-2." in page


def test_the_page_of_an_evaluation() -> None:
    page = render_evaluation(make_evaluation_report())
    outline = Outline(page)
    assert [text for level, text in outline.headings if level < 3] == [
        "DPO is better than champion on 1 of 8 measures", "Win rates", "Tasks", "Comparisons", "Samples",
        "Cost", "Models", "Reproduce",
    ]  # fmt: skip
    assert len([a for a in outline.all("svg") if a.get("role") == "img"]) == 3
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert "dpo compare runs/calm-otter-17/dpo models:/imdb-dpo@champion --suites all" in page
    for model in make_evaluation_report().models:
        assert model.sha256 in page
    assert render_evaluation(make_evaluation_report()) == page


def test_the_page_of_an_evaluation_escapes_everything() -> None:
    measures = {k: v for k, v in hostile_measured(HOSTILE).items() if k != "decision"}
    models = [make_evaluation_report().models[0].model_copy(update={"name": HOSTILE})]
    more = {"models": models, "command": HOSTILE, "notes": {HOSTILE: HOSTILE}}
    report = make_evaluation_report(**measures, **more)
    outline = Outline(render_evaluation(report))
    assert not outline.all("script")
    assert not outline.all("img")
    assert not [k for _, a in outline.tags for k in a if k.startswith("on")]
    outside = markdown(report).split("## Reproduce")[0]
    assert "<script" not in outside.replace("\\<", "")
    for table in re.findall(r"(?:^\|.*\n)+", outside, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_markdown_and_terminal_of_an_evaluation() -> None:
    report = make_evaluation_report()
    text = markdown(report)
    assert text.startswith(
        "# DPO is better than champion on 1 of 8 measures\n\n- DPO against champion: 1 better"
    )
    assert "| MMLU (Accuracy) | 33.1% \\[30.7% to 35.5%\\], 32.9% clean |" in text
    assert report.models[1].sha256 in text
    out = io.StringIO()
    Console(file=out, width=80, color_system=None).print(terminal_table(report))
    shown = out.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.count("○ undecided") == 7
    assert "13 min 32 s on 1 × accelerator" in shown
    assert f"champion: weights {report.models[1].sha256[:12]}" in shown
