"""The run report: its verdict and alarms, its numbers in words, the terminal and Markdown."""

import math
import random
import re

import pytest
from pydantic import ValidationError

from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.evaluation.policy_row import PolicyRow
from dpo_core.evaluation.summary import PolicySamples, summarise_samples
from dpo_core.statistics.estimates import Estimate
from dpo_core.statistics.format import duration, interval, number, p_value, scaled
from expectations.report import Finding
from tasks.reports.alarms import alarms
from tasks.reports.run_document import policy_table
from tasks.reports.run_report import EvaluationDetails, GateRow, PolicyTable, RunReport
from tasks.reports.verdict import verdict
from tests.support.reports.rendered import page, shown, text
from tests.support.reports.run_reports import (
    estimate,
    example,
    hostile,
    make_evaluation,
    make_gate,
    make_policies,
    make_quality,
    make_stages,
    with_policy,
)


def test_report_survives_json() -> None:
    report = example(steps=20)
    assert RunReport.model_validate_json(report.model_dump_json()) == report


def test_report_is_frozen_and_closed() -> None:
    report = example(steps=20)
    with pytest.raises(ValidationError, match="frozen"):
        report.notes = {}  # type: ignore[misc]
    with pytest.raises(ValidationError, match="speed"):
        RunReport(run=report.run, candidate="DPO", speed=1)  # type: ignore[call-arg]


def test_every_metric_of_the_evaluation_stands_in_the_table() -> None:
    """None is dropped on the way from the stage to the page."""
    drawn = PolicySamples(
        [0, 0, 1, 1], [TokenSequence((1,), (2, 3))] * 4, [True, True, True, False], [0.0, 1.0, 0.5, 0.2],
        [0.1] * 4, [0.2] * 4, 1.25, [1.0] * 4, ["a good film", "a bad film", "it was long", "it was short"],
    )  # fmt: skip
    row = summarise_samples(drawn, drawn, seed=0, length=2)
    policies = [PolicyRow(name="DPO", **row)]
    evaluation = make_evaluation().model_copy(update={"policies": policies})
    lines = {line.label: line for line in policy_table(evaluation, example(steps=2)).lines}
    assert lines.keys() == {PolicyRow.shown()[name].label for name in row.keys() | {"accuracy"}}
    assert lines["Answers that end"].cells[0].value == "75.0%"
    assert policies[0].values().keys() == row.keys(), "MLflow is sent all of them"


def test_a_metric_that_reports_do_not_know_is_an_error_where_it_is_measured() -> None:
    with pytest.raises(ValidationError, match="surprise"):
        PolicyRow(**make_evaluation().policies[0].model_dump(), surprise=1.0)
    assert PolicyRow.shown().keys() == PolicyRow.model_fields.keys() - {"name"}


def test_what_was_measured_is_read_as_it_was_written() -> None:
    table = make_evaluation().model_dump(mode="json", include=set(PolicyTable.model_fields))
    measured = EvaluationDetails(**table, held_out_pairs=3)
    again = EvaluationDetails.model_validate_json(measured.model_dump_json(exclude_unset=True))
    assert again == measured
    assert measured.policy("DPO") == again.policies[1]
    with pytest.raises(ValidationError, match="surprise"):
        EvaluationDetails(**table, held_out_pairs=3, surprise={})


def test_values_that_are_not_finite_are_dropped_from_curves() -> None:
    rows = [{"step": 1, "loss": 0.7, "grad_norm": math.nan}, {"step": 2, "loss": math.inf, "grad_norm": 2}]
    report = example(curves={"train-dpo DPO": rows})
    assert report.curves["train-dpo DPO"] == [{"step": 1, "loss": 0.7}, {"step": 2, "grad_norm": 2}]
    assert RunReport.model_validate_json(report.model_dump_json()) == report
    with pytest.raises(ValidationError):
        example(curves={"train-dpo DPO": [{"step": 1, "loss": "high"}]})


@pytest.mark.parametrize(
    ("low", "high", "kind", "words"),
    [
        (0.01, 0.3, "good", "higher"),
        (-0.3, -0.01, "bad", "lower"),
        (-0.01, 0.3, "unclear", "No difference"),
        (0.0, 0.3, "unclear", "No difference"),
        (-0.3, 0.0, "unclear", "No difference"),
    ],
)
def test_the_interval_of_the_gain_decides(low: float, high: float, kind: str, words: str) -> None:
    headline, of_rule, reasons, _ = verdict(
        with_policy("DPO", gain=Estimate(value=(low + high) / 2, low=low, high=high, n=256))
    )
    assert of_rule == kind
    assert words in headline
    assert "256 prompts" in reasons[0]
    assert any("contains zero" in reason for reason in reasons) == (kind == "unclear")


def test_verdict_without_a_comparison() -> None:
    assert verdict(example(steps=2, evaluation=None)).kind == "unclear"
    assert verdict(with_policy("DPO", gain=None)).kind == "unclear"
    refused = make_gate()[0].model_copy(update={"refused": True})
    headline, kind, *_ = verdict(example(steps=2, gate=[refused], evaluation=None))
    assert (headline, kind) == ("The data gate refused train pairs", "bad")


def test_verdict_names_a_learned_reward() -> None:
    proxy = make_evaluation().model_copy(update={"reward_is_true": False})
    assert any("learned proxy" in r for r in verdict(example(steps=2, evaluation=proxy)).reasons)
    assert not any("learned proxy" in r for r in verdict(example(steps=2)).reasons)


def test_a_healthy_run_raises_no_alarm() -> None:
    assert alarms(example()) == []


def test_the_accuracy_stands_with_dashes_where_there_were_no_pairs() -> None:
    evaluation = make_evaluation()
    rows = [row.model_copy(update={"accuracy": None, "entropy": None}) for row in evaluation.policies]
    markdown = text(example(steps=2, evaluation=evaluation.model_copy(update={"policies": rows})))
    (line,) = (line for line in markdown.splitlines() if "Preference accuracy" in line)
    assert line.endswith("|" + " – |" * len(rows))
    assert "Entropy" not in markdown, "other lines that nobody measured stay out"


def _curve(**metrics: list[float]) -> dict[str, list[dict[str, float]]]:
    length = len(next(iter(metrics.values())))
    rows = [
        {"step": float(i), **{k.replace("__", "/"): v[i] for k, v in metrics.items()}} for i in range(length)
    ]
    return {"train-dpo DPO": rows}


FALLING, RISING = [float(-i) for i in range(20)], [float(i) for i in range(20)]
BAD_ACCURACY = [0.8] * 10 + [0.6] * 10


@pytest.mark.parametrize(
    ("report", "name"),
    [
        (example(curves=_curve(logps__chosen=FALLING, rewards__chosen=FALLING)), "Likelihood displacement"),
        (example(curves=_curve(error__chosen=[1.0] * 10 + [1.3] * 10)), "Likelihood displacement"),
        (with_policy("DPO", kl=estimate(10.1, 1)), "KL run-away"),
        (with_policy("PPO", kl=estimate(10.1, 1)), "KL run-away"),
        (with_policy("PPO", kl=estimate(2.0, 0.3)), "KL run-away"),
        (with_policy("DPO", entropy=1.4), "Diversity collapse"),
        (with_policy("PPO", distinct_2=0.3), "Diversity collapse"),
        (with_policy("DPO", length=estimate(66, 2)), "Length drift"),
        (with_policy("DPO", length=estimate(29, 2)), "Length drift"),
        (with_policy("DPO", accuracy=estimate(0.45, 0.03)), "Reward without accuracy"),
        (example(curves=_curve(rewards__accuracies=BAD_ACCURACY)), "Reward without accuracy"),
        (example(notes={"Class weights": "the ratio is 2"}), "Class weights"),
    ],
)
def test_each_failure_raises_its_own_alarm(report: RunReport, name: str) -> None:
    assert [alarm.name for alarm in alarms(report)] == [name]


@pytest.mark.parametrize(
    "report",
    [
        # Chosen fell but stays above the reference; chosen is below the reference but did not fall.
        example(curves=_curve(logps__chosen=FALLING, rewards__chosen=RISING)),
        example(curves=_curve(logps__chosen=RISING, rewards__chosen=FALLING)),
        # Chosen ends below the reference, by no more than batches differ.
        example(curves=_curve(logps__chosen=FALLING, rewards__chosen=[0.1, -0.2, 0.1, 0.2, -0.3] * 4)),
        example(curves=_curve(rewards__accuracies=BAD_ACCURACY[::-1])),
        with_policy("DPO", kl=estimate(9.9, 1)),
        with_policy("PPO", kl=estimate(2.1, 0.3)),
        with_policy("DPO", entropy=1.45, distinct_2=0.31, length=estimate(65, 2)),
    ],
)
def test_alarms_stay_quiet_just_inside_the_limits(report: RunReport) -> None:
    assert alarms(report) == []


def _ppo(steps: int = 40, seed: int = 0, spread: float = 0.1, **means: tuple[float, float]) -> RunReport:
    """PPO whose metrics go in a line from one mean to another, with noise."""
    rng = random.Random(seed)
    known = {"objective/scores": (0.0, 0.0)} | {k.replace("__", "/"): v for k, v in means.items()}
    rows = [
        {"step": float(i)}
        | {k: a + (b - a) * i / (steps - 1) + rng.gauss(0, spread) for k, (a, b) in known.items()}
        for i in range(steps)
    ]
    return example(steps=2, curves={"train-ppo PPO": rows})


LENGTH = {"completions__mean_length": (20.0, 20.0)}


@pytest.mark.parametrize(
    ("report", "name", "words"),
    [
        (_ppo(objective__scores=(0, 1), objective__gold_scores=(0.5, 0.1)), "Over-optimisation",
         ("PPO: the learned reward rose from 0.1", "while the known reward fell from 0.4")),
        (_ppo(8, spread=0.02, objective__scores=(0, 1), objective__gold_scores=(0.5, -0.5)),
         "Over-optimisation", ()),
        (_ppo(objective__kl=(0, 14)), "KL run-away", ("PPO: the policy was 12.", "nats from the reference")),
        (_ppo(objective__kl=(0, 8), objective__kl_target=(2, 2), spread=0.0), "KL run-away",
         ("PPO: the policy was 7.08 nats", "for a target of 2.00")),
        (_ppo(objective__entropy=(50, 15), **LENGTH), "Entropy collapse",
         ("PPO: the entropy per token fell from 2.4", "to 0.8")),
        (_ppo(policy__entropy_avg=(3, 1)), "Entropy collapse", ("PPO: the entropy per token fell from",)),
    ],
)  # fmt: skip
def test_each_failure_of_on_policy_training_raises_its_own_alarm(report, name, words) -> None:
    (alarm,) = alarms(report)
    assert alarm.name == name
    for word in words:
        assert word in alarm.message
    assert alarm.message in " ".join(text(report).split())


@pytest.mark.parametrize(
    "report",
    [
        # Both rewards rise; the known one falls by less than batches differ; the learned one does not rise.
        _ppo(objective__scores=(0, 1), objective__gold_scores=(0, 0.3)),
        _ppo(objective__scores=(0, 1), objective__gold_scores=(0.5, 0.49)),
        _ppo(objective__scores=(0, 0), objective__gold_scores=(0.5, 0)),
        _ppo(3, objective__scores=(0, 1), objective__gold_scores=(1, 0)),
        # Far for a moment, and within three times the target.
        _ppo(objective__kl=(20, 0)),
        _ppo(objective__kl=(0, 6), objective__kl_target=(2, 2)),
        # Shorter answers have less entropy each, and as much a token.
        _ppo(objective__entropy=(50, 15), completions__mean_length=(20, 6), spread=0.0),
        _ppo(objective__entropy=(50, 30), **LENGTH),
        # Not a policy's own samples.
        example(curves=_curve(objective__kl=[20.0] * 20)),
    ],
)
def test_on_policy_alarms_stay_quiet_where_nothing_is_shown(report: RunReport) -> None:
    assert alarms(report) == []


@pytest.mark.parametrize("steps", [8, 40])
def test_noise_raises_no_alarm_of_on_policy_training(steps: int) -> None:
    flat = {
        "objective__gold_scores": (0.2, 0.2), "objective__kl": (4.0, 4.0), "objective__kl_target": (4.0, 4.0),
        "objective__entropy": (40.0, 40.0), "policy__entropy_avg": (2.0, 2.0), **LENGTH,
    }  # fmt: skip
    raised = [alarms(_ppo(steps, seed, 0.3, **flat)) for seed in range(100)]
    assert sum(map(len, raised)) == 0


def test_gate_warnings_are_an_alarm_and_notes_are_not() -> None:
    findings = [f.model_copy(update={"passed": False}) for f in make_gate()[0].findings]
    (alarm,) = alarms(example(steps=2, gate=[make_gate()[0].model_copy(update={"findings": findings})]))
    assert "(length_bias, warning, 2,611 rows)" in alarm.message
    assert "prompt_leakage" not in alarm.message  # its severity is off


def test_the_gate_shows_failed_rules_first_and_folds_the_others() -> None:
    failed = Finding(
        rule="pairs/length_bias", severity="warning", passed=False, observed=0.71,
        threshold={"max_share": 0.65}, rows=[3, 9], message="chosen is longer", remedy="balance the lengths",
    )  # fmt: skip
    skipped = failed.model_copy(update={"skipped": True, "passed": True})
    html = page(example(steps=2, gate=[GateRow(subject="pairs", rows=10, findings=[skipped, failed])]))
    part = html[html.index('<section id="gate"') : html.index('<section id="cost"')]
    shown, folded = part.split("<details>")
    for words in ("0.710", "max_share 0.650", "rows 3, 9", '<span class="mark">warning</span>'):
        assert words in shown, words
    assert '<span class="mark">skipped</span>' in folded


def test_formats() -> None:
    assert [number(v) for v in (0, 0.01234, 1.234, 12.34, 1234.4, -0.5, 1.2e-5)] == [
        "0", "0.0123", "1.23", "12.3", "1,234", "-0.500", "1.2e-05",
    ]  # fmt: skip
    assert (number(0.5, signed=True), number(0.066, scale=0.17), number(0, scale=1)) == (
        "+0.500", "0.066", "0.00",
    )  # fmt: skip
    assert [duration(s) for s in (3.21, 245, 7620, 3599.9)] == [
        "3.2 s",
        "4 min 05 s",
        "2 h 07 min",
        "1 h 00 min",
    ]
    assert (scaled(3.5 * 2**30, "B", 1024), scaled(2.6e15, "FLOP"), scaled(0, "B")) == (
        "3.5 GiB", "2.6 PFLOP", "0 B",
    )  # fmt: skip


def test_intervals_have_one_notation() -> None:
    value = Estimate(value=0.0312, low=-0.0049, high=0.067, n=9)
    shown = {kind: str(interval(value, kind)) for kind in ("number", "gap", "share", "points")}
    assert shown == {
        "number": "0.0312 [-0.0049 to 0.0670]", "gap": "+0.0312 [-0.0049 to +0.0670]",
        "share": "3.1% [-0.5% to 6.7%]", "points": "+3.1 pp [-0.5 to +6.7]",
    }  # fmt: skip
    assert (p_value(0.0004), p_value(0.0316), p_value(1.0)) == ("< 0.001", "0.032", "1.000")


def test_accuracy_without_a_gain_is_explained() -> None:
    report = with_policy("DPO", gain=estimate(0.0, 0.1), accuracy=estimate(0.99, 0.01))
    assert any(
        reason.startswith("Preference accuracy is 99.0% without a gain") for reason in verdict(report).reasons
    )
    assert not any("without a gain" in reason for reason in verdict(example(steps=2)).reasons)


# -------------------------------------------------------------------------------------- terminal, Markdown


def test_terminal_table_fits_80_columns() -> None:
    words = shown(example(steps=20))
    assert max(map(len, words.splitlines())) <= 80
    assert "…" not in words
    for stage in make_stages():
        assert stage.name.removesuffix(" DPO").removesuffix(" PPO") in words
    assert "train-dpo DPO" not in words, "one policy has that method"
    for word in (
        *("DPO scores higher than SFT", "+0.523", "+0.465 to +0.581", "22 min 05 s", "cached", "74.2%"),
        *("Win rates", "Tasks", "DPO against champion: 1 better", "▲ better", "+7.5 pp"),
    ):
        assert word in words, word
    assert "○ undecided" not in words, "the end of a run is brief: the title counts them"


def test_terminal_shows_alarms_and_does_not_read_markup() -> None:
    report = with_policy("DPO", kl=estimate(14.0, 1))
    rates = [report.win_rates[0].model_copy(update={"judge": "[red]x[/nope]"})]
    words = shown(report.model_copy(update={"win_rates": rates}))
    assert "! KL run-away: DPO is 14.0 nats from the reference." in words
    assert "judge: [red]x[/nope]" in " ".join(words.split())


def test_markdown_tables_keep_their_columns_and_escape_markup() -> None:
    outside, command = text(hostile()).split("## Reproduce")
    assert "<script" not in outside.replace("\\<", "")
    tables = re.findall(r"(?:^\|.*\n)+", outside, flags=re.M)
    assert len(tables) == 6  # policies, win rates, tasks, a comparison, gate, stages
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    fence = re.search(r"^(`+)sh$", command, flags=re.M)
    assert fence
    assert len(fence[1]) == 4  # the command holds three


def test_markdown_of_the_example() -> None:
    markdown = text(example(steps=20, reward_model=make_quality(temperature=None)))
    assert markdown.startswith("# DPO scores higher than SFT\n")
    assert "| – | +0.523 \\[+0.465 to +0.581\\] | +0.584 \\[+0.529 to +0.639\\] |" in markdown
    assert "dpo run imdb_sentiment --set dpo.beta=0.1 --set seed=7" in markdown
    assert "| 68.4% \\[64.4% to 72.4%\\] |" in markdown


def test_the_page_and_markdown_say_what_the_reward_model_was_for() -> None:
    learned = make_policies(ppo_reward="model")
    report = example(steps=2, reward_model=make_quality(), policies=learned)
    assert "PPO learned from it. The policies were evaluated with vader\\_compound, not with it." in text(
        report
    )
    proxy = make_evaluation().model_copy(update={"reward_is_true": False})
    assert "The policies were evaluated with it." in text(report.model_copy(update={"evaluation": proxy}))
    assert "## Reward model" not in text(example(steps=2))


def test_a_reference_that_was_not_fine_tuned_is_called_the_base_model() -> None:
    report = example(steps=20)
    imported = report.model_copy(update={"fine_tuned": False})
    assert "over SFT " in " ".join(verdict(report).reasons)
    assert "over SFT (base model) " in " ".join(verdict(imported).reasons)
