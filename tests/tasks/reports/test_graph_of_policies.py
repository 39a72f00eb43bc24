"""Reports of runs whose policies have other names, other candidates and each other as start and reference."""

import re
from typing import Any

import pytest

from tasks.reports.alarms import alarms, promotion_alarms
from tasks.reports.lineage import chain
from tasks.reports.run_report import ModelRow, PolicyAbout, RunReport, StageRow
from tasks.reports.verdict import finding
from tasks.stages.summary import headline_metrics
from tests.support.reports.outline import Outline
from tests.support.reports.rendered import page, text
from tests.support.reports.run_reports import (
    digest,
    estimate,
    example,
    make_evaluation,
    make_policy,
    make_stages,
)

FALLING = [float(-i) for i in range(20)]
DISPLACED = [{"step": float(i), "logps/chosen": v, "rewards/chosen": v} for i, v in enumerate(FALLING)]


def run_of(policies: dict[str, PolicyAbout], candidate: str, **changes: Any) -> RunReport:
    """A run of these policies, each measured like PPO of the example."""
    sft, _, like = make_evaluation().policies
    rows = [sft, *(like.model_copy(update={"name": name}) for name in policies)]
    stages = [row for row in make_stages() if not row.name.startswith("train-")]
    trained = [
        StageRow(name=about.stage, state="ran", seconds=60, kind="model", sha256=digest(about.stage))
        for about in policies.values()
    ]
    model = ModelRow(name="m", version="3", uri="file:///m", sha256=digest(policies[candidate].stage))
    known: dict[str, Any] = {
        "evaluation": make_evaluation().model_copy(update={"policies": rows, "samples": []}),
        "stages": [*stages, *trained], "curves": {}, "win_rates": [], "suites": [], "comparisons": [],
        "policies": policies, "candidate": candidate, "model": model,
    }  # fmt: skip
    return example(steps=2, **(known | changes))


def chained(**changes: Any) -> RunReport:
    """A, then B from A, then C from B, which is the candidate; D stands beside them."""
    policies = {
        "A": make_policy("dpo", "A"),
        "B": make_policy("dpo", "B", start="A", reference="A"),
        "C": make_policy("grpo", "C", start="B"),
        "D": make_policy("dpo", "D"),
    }
    return run_of(policies, "C", **changes)


def test_a_candidate_that_samples_has_the_verdict() -> None:
    policies = {"Base": make_policy("dpo", "Base"), "Better": make_policy("grpo", "Better", start="Base")}
    report = run_of(policies, "Better")
    headline, kind, reasons, _ = finding(report)
    assert (headline, kind) == ("Better scores higher than SFT", "good")
    assert any(reason.startswith("Base (dpo): gain +0.584") for reason in reasons)
    assert headline_metrics(report)["gain/better"] == headline_metrics(report)["gain/base"] == 0.584


def test_a_run_of_a_and_b_speaks_of_them_alone() -> None:
    report = run_of({"A": make_policy("dpo", "A"), "B": make_policy("ppo", "B")}, "A")
    html, markdown = page(report), text(report)
    assert finding(report).headline == "A (dpo) scores higher than SFT"
    for name in ("DPO", "PPO"):
        assert name not in markdown
        assert name not in html
    assert ">train-dpo<" in html, "one policy has that method"


def test_several_policies_of_a_method_keep_their_stages_apart() -> None:
    report = run_of({"A": make_policy("dpo", "A"), "B": make_policy("dpo", "B")}, "A")
    assert [report.stage_label(f"train-dpo {name}") for name in "AB"] == ["train-dpo A", "train-dpo B"]


def test_a_chain_stands_on_the_page_in_words() -> None:
    report = chained()
    links = [(link.label, link.name) for link in chain(report)]
    assert links[1:4] == [("Reference", "prepare-sft"), ("Start", "A (dpo)"), ("Start", "B (dpo)")]
    assert chain(report)[3].sha256 == digest("train-dpo B")
    html = page(report)
    table = html[html.index("The policies that were trained") :]
    rows = [" ".join(row.split()) for row in table[: table.index("</table>")].split("<tr>")[2:]]
    assert [re.search(r'<th scope="row">(.*?)</th>', row)[1] for row in rows] == [
        "A (dpo)", "B (dpo)", "C", "D (dpo)",
    ]  # fmt: skip
    assert re.findall(r"<td[^>]*>(.*?)</td>", rows[2])[:4] == ["grpo", "–", "B", "SFT"]
    assert re.findall(r"<td[^>]*>(.*?)</td>", rows[1])[1:4] == ["dpo, beta 0.1", "A", "A"]
    ids = [a["id"] for _, a in Outline(html).tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_a_model_from_outside_is_the_start_of_the_chain() -> None:
    name = "models:/m@champion"
    fetched = StageRow(
        name=f"import-model {name}", state="ran", seconds=1, kind="model", sha256=digest("champion")
    )
    report = run_of({"A": make_policy("dpo", "A", start=name, reference=name)}, "A")
    report = report.model_copy(update={"stages": [*report.stages, fetched]})
    assert chain(report)[2] == ("Start", name, digest("champion"))
    assert name in page(report)


@pytest.mark.parametrize(("policy", "counts"), [("A", True), ("B", True), ("C", True), ("D", False)])
def test_alarms_count_where_their_policy_is_behind_the_candidate(policy: str, counts: bool) -> None:
    stage = chained().policies[policy].stage
    report = chained(curves={stage: DISPLACED})
    (alarm,) = alarms(report)
    assert (alarm.name, alarm.policy) == ("Likelihood displacement", policy)
    assert ("below A" in alarm.message) == (policy == "B"), "B's reference"
    assert (alarm.name in promotion_alarms([alarm], report)) == counts


def test_unusual_parameters_are_of_their_policy() -> None:
    policies = {"A": make_policy("dpo", "A"), "B": make_policy("dpo", "B", unusual="dpo with beta 5.")}
    report = run_of(policies, "A")
    assert [(alarm.name, alarm.policy) for alarm in alarms(report)] == [("Unusual parameters", "B")]
    assert promotion_alarms(alarms(report), report) == {}


def test_metrics_of_names_that_mlflow_refuses_stay_apart() -> None:
    report = run_of({name: make_policy("dpo", name) for name in ("β+", "γ+", "b c")}, "β+")
    keys = {key for key in headline_metrics(report) if key.startswith("gain/")}
    assert keys == {"gain/__", "gain/__-2", "gain/b c"}


def test_farther_than_a_policy_that_samples_is_an_alarm_of_every_direct_one() -> None:
    policies = {"A": make_policy("dpo", "A"), "B": make_policy("dpo", "B"), "S": make_policy("grpo", "S")}
    report = run_of(policies, "S")
    assert report.evaluation is not None
    far = {"A": 6.0, "B": 1.5, "S": 1.0}
    rows = [
        row.model_copy(update={"kl": estimate(far[row.name], 0.1)}) if row.name in far else row
        for row in report.evaluation.policies
    ]
    evaluation = report.evaluation.model_copy(update={"policies": rows})
    (alarm,) = alarms(report.model_copy(update={"evaluation": evaluation}))
    assert (alarm.name, alarm.policy) == ("KL run-away", "A")
    assert alarm.message == "A (dpo) is 6.00 nats from the reference, S 1.00."
