"""The run report, its verdict and alarms, and the three ways in which a person reads it.

`example` builds a report from synthetic numbers of a realistic size; nothing here was measured.
"""

import io
import math
import random
import re
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from dpo_core.stats import Estimate
from expectations.report import Finding
from tasks.page import MAX_SAMPLES, render
from tasks.page_figures import MAX_POINTS, curve_figures
from tasks.report import (
    Cost,
    Evaluation,
    GateFinding,
    GateRow,
    ModelRow,
    PolicyRow,
    RunInfo,
    RunReport,
    Sample,
    StageRow,
    alarms,
    duration,
    markdown,
    number,
    scaled,
    terminal_table,
    verdict,
)


def estimate(value: float, half: float, n: int = 256) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, n=n)


def _curves(steps: int) -> dict[str, list[dict[str, float]]]:
    rng = random.Random(0)
    sft, dpo, ppo = [], [], []
    for step in range(1, steps + 1):
        t = step / steps

        def near(value: float, spread: float) -> float:
            return rng.gauss(value, spread)

        sft.append(
            {"step": step, "loss": near(1.1 + 1.3 * math.exp(-5 * t), 0.05), "grad_norm": near(1.2, 0.2)}
        )
        chosen, rejected = near(0.5 * t, 0.08), near(-1.1 * t, 0.12)
        row = {
            "step": step,
            "loss": near(math.log(2) - 0.24 * t, 0.03),
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": min(1.0, max(0.0, near(0.5 + 0.24 * (1 - math.exp(-4 * t)), 0.06))),
            "logps/chosen": near(-88 + 5 * t, 2.5),
            "logps/rejected": near(-84 - 11 * t, 2.5),
            "grad_norm": near(4 + 2 * t, 0.8),
            "learning_rate": 1e-6 * (1 - t),
        }
        if step % max(1, steps // 8) == 0:
            row |= {"eval_loss": near(0.5, 0.01), "eval_rewards/accuracies": near(0.66 + 0.05 * t, 0.01)}
        dpo.append(row)
        ppo.append(
            {
                "step": step,
                "objective/scores": near(0.1 + 0.7 * t, 0.07),
                "objective/rlhf_reward": near(0.1 + 0.5 * t, 0.07),
                "objective/kl": near(4.5 * t, 0.3),
                "val/ratio": near(1, 0.01),
                "policy/approxkl_avg": abs(near(0.01, 0.004)),
            }
        )
    return {"sft": sft, "train_dpo": dpo, "ppo": ppo}


def _digest(name: str) -> str:
    return sha256(name.encode()).hexdigest()


def _stages() -> list[StageRow]:
    table: list[tuple[str, Any, float, str, int | None, int | None, list[str]]] = [
        ("validate", "ran", 6.1, "preference_pairs", 4812, None, []),
        ("prepare", "ran", 11.4, "packs", 1210, None, ["validate"]),
        ("sft", "cached", 0.3, "model", None, 134_515_008, ["prepare"]),
        ("cache_reference", "ran", 48.2, "reference_logps", 4812, None, ["prepare", "sft"]),
        ("train_dpo", "ran", 1325.0, "model", None, 134_515_008, ["prepare", "sft", "cache_reference"]),
        ("ppo", "ran", 2874.5, "model", None, 134_515_008, ["sft"]),
        ("evaluate", "ran", 310.7, "evaluation", 256, None, ["sft", "train_dpo", "ppo"]),
        ("promote", "skipped", 0.0, "registration", None, None, ["evaluate"]),
    ]
    return [
        StageRow(
            name=name, state=state, seconds=seconds, kind=kind, rows=rows, parameters=parameters,
            sha256=None if state == "skipped" else _digest(name), parents=[_digest(p) for p in parents],
            uri=f"file:///srv/dpo/runs/artifacts/{kind}/{_digest(name)[:16]}",
            mlflow_run_id=_digest(name + "run")[:32],
        )
        for name, state, seconds, kind, rows, parameters, parents in table
    ]  # fmt: skip


def _evaluation() -> Evaluation:
    prompt = "The film opens on a rainy street, and for the next hour"
    answers = {
        "SFT": "nothing much happens. The cast walks about, and the story is about a man who is a man.",
        "DPO": "it never lets go: the two leads are wonderful together, and the camera knows when to wait.",
        "PPO": "it is a wonderful, wonderful film with a great cast and a great, great story that I loved.",
    }
    samples = [
        Sample(prompt=prompt, completions=answers, rewards={"SFT": -0.21, "DPO": 0.86, "PPO": 0.95}),
        Sample(
            prompt="I bought this phone in May\nand the battery",
            completions={"SFT": "is dead.", "DPO": "still lasts two days. I am impressed.", "PPO": ""},
            rewards={"SFT": -0.65, "DPO": 0.48, "PPO": 0.0},
        ),
    ]
    return Evaluation(
        reward_name="vader_compound",
        reward_is_true=True,
        n_prompts=256,
        samples_per_prompt=4,
        policies=[
            PolicyRow(name="SFT", reward=estimate(0.118, 0.052), length=estimate(43.7, 1.8), distinct_2=0.612,
                      entropy=2.87),
            PolicyRow(name="DPO", reward=estimate(0.641, 0.044), gain=estimate(0.523, 0.058),
                      kl=estimate(6.21, 0.48), kl_k3=estimate(6.34, 0.41), win_rate=estimate(0.742, 0.041),
                      length=estimate(47.2, 1.6), distinct_2=0.548, accuracy=estimate(0.703, 0.028, 1024),
                      entropy=2.31),
            PolicyRow(name="PPO", reward=estimate(0.702, 0.04), gain=estimate(0.584, 0.055),
                      kl=estimate(4.48, 0.39), kl_k3=estimate(4.55, 0.35), win_rate=estimate(0.765, 0.04),
                      length=estimate(51.9, 1.2), distinct_2=0.431, entropy=1.98),
        ],
        samples=samples,
    )  # fmt: skip


def _gate() -> list[GateRow]:
    finding = GateFinding
    return [
        GateRow(
            subject="train pairs", rows=4860, dropped=48, docs_uri="file:///srv/dpo/runs/data_docs/index.html",
            findings=[
                finding(rule="chosen_differs_from_rejected", severity="critical", passed=True, count=0,
                        rate=0.0, threshold=0.0, message="they differ in every row, also after truncation"),
                finding(rule="length_bias", severity="warning", passed=True, count=2611, rate=0.537,
                        threshold=0.65, message="chosen is longer in 53.7% of the pairs", rows=[3, 17, 40]),
                finding(rule="prompt_leakage", severity="info", passed=False, count=2, rate=0.0004,
                        threshold=0.0, message="prompts that also occur in the test set", rows=[112, "b7e1"]),
            ],
        )
    ]  # fmt: skip


def example(steps: int = 300, **changes: Any) -> RunReport:
    """A finished run without alarms. `changes` replaces whole parts of the report."""
    started = datetime(2025, 3, 1, 9, 0, tzinfo=UTC)
    seconds = 4576.2
    stages = _stages()
    parts: dict[str, Any] = {
        "run": RunInfo(
            name="calm-otter-17", recipe="imdb_sentiment", started_at=started,
            finished_at=started + timedelta(seconds=seconds), seconds=seconds, git_commit="3f2a9c1d" * 5,
            command="dpo run imdb_sentiment --set dpo.beta=0.1 --set seed=7",
            mlflow_run_id=_digest("run")[:32],
            tracking_uri="sqlite:///runs/mlflow.db", python="3.11.2", platform="Linux-6.1-x86_64",
            hardware="1 × accelerator with 80 GiB, 16 cores, 128 GiB memory",
        ),
        "stages": stages,
        "gate": _gate(),
        "evaluation": _evaluation(),
        "curves": _curves(steps),
        "cost": Cost(
            seconds=seconds, seconds_by_stage={s.name: s.seconds for s in stages}, tokens_trained=2_417_664,
            flops=2.6e15, peak_memory_bytes=23_622_320_128,
        ),
        "model": ModelRow(
            name="imdb-dpo", version="4", alias="champion", uri="models:/imdb-dpo@champion",
            sha256=_digest("train_dpo"),
        ),
        "notes": {"seed": 7, "beta": 0.1},
    }  # fmt: skip
    return RunReport(**(parts | changes))


def with_policy(name: str, **changes: Any) -> RunReport:
    """The example with one policy's row changed."""
    evaluation = _evaluation()
    rows = [r.model_copy(update=changes) if r.name == name else r for r in evaluation.policies]
    return example(steps=20, evaluation=evaluation.model_copy(update={"policies": rows}))


def alarming() -> RunReport:
    """A run that went wrong in every way that the page can show."""
    curves = _curves(120)
    for row in curves["train_dpo"]:
        row |= {"logps/chosen": -88 - 0.4 * row["step"], "rewards/chosen": -0.02 * row["step"]}
    evaluation = _evaluation()
    changes: dict[str, dict[str, Any]] = {
        "DPO": {"gain": estimate(0.021, 0.06), "kl": estimate(15.4, 1.1), "length": estimate(88.2, 3),
                "distinct_2": 0.21, "accuracy": estimate(0.44, 0.03)},
    }  # fmt: skip
    rows = [row.model_copy(update=changes.get(row.name, {})) for row in evaluation.policies]
    failed = [finding.model_copy(update={"passed": False}) for finding in _gate()[0].findings]
    return example(
        evaluation=evaluation.model_copy(update={"policies": rows, "reward_is_true": False}),
        curves=curves,
        gate=[_gate()[0].model_copy(update={"findings": failed})],
    )


def coinciding() -> RunReport:
    """Policies that barely moved from SFT and from each other: their marks lie on one another."""
    evaluation = _evaluation()
    near = {"gain": estimate(0.001, 0.06), "kl": estimate(0.004, 0.02)}
    rows = [r if r.name == "SFT" else r.model_copy(update=near) for r in evaluation.policies]
    return example(steps=2, evaluation=evaluation.model_copy(update={"policies": rows}))


HOSTILE = (
    '<script>alert(1)</script><img src="http://evil.example/x.png" onerror=alert(1)> | `x` [a](http://b) $x$'
)


def hostile() -> RunReport:
    """The example with markup wherever free text can come from data, models or people."""
    base = example(steps=20)
    evaluation = _evaluation()
    sample = Sample(prompt=HOSTILE, completions={"SFT": HOSTILE, "DPO": HOSTILE}, rewards={"SFT": 0.1})
    finding = _gate()[0].findings[0].model_copy(update={"message": HOSTILE, "rule": HOSTILE, "passed": False})
    gate = _gate()[0].model_copy(
        update={"subject": HOSTILE, "findings": [finding], "docs_uri": "javascript:alert(1)"}
    )
    stages = [
        base.stages[0].model_copy(update={"name": HOSTILE, "uri": 'https://x/"><script>'}),
        *base.stages,
    ]
    return base.model_copy(
        update={
            "run": base.run.model_copy(update={"name": HOSTILE, "command": "dpo run '```' " + HOSTILE}),
            "evaluation": evaluation.model_copy(update={"samples": [sample], "reward_name": HOSTILE}),
            "gate": [gate],
            "stages": stages,
            "curves": {HOSTILE: base.curves["train_dpo"]},
            "notes": {HOSTILE: HOSTILE},
        }
    )


# --------------------------------------------------------------------------------------- report and verdict


def test_report_survives_json() -> None:
    report = example(steps=20)
    assert RunReport.model_validate_json(report.model_dump_json()) == report


def test_report_is_frozen_and_closed() -> None:
    report = example(steps=20)
    with pytest.raises(ValidationError, match="frozen"):
        report.notes = {}  # type: ignore[misc]
    with pytest.raises(ValidationError, match="speed"):
        RunReport(run=report.run, speed=1)  # type: ignore[call-arg]


def test_values_that_are_not_finite_are_dropped_from_curves() -> None:
    rows = [{"step": 1, "loss": 0.7, "grad_norm": math.nan}, {"step": 2, "loss": math.inf, "grad_norm": 2}]
    report = example(curves={"train_dpo": rows})
    assert report.curves["train_dpo"] == [{"step": 1, "loss": 0.7}, {"step": 2, "grad_norm": 2}]
    assert RunReport.model_validate_json(report.model_dump_json()) == report
    with pytest.raises(ValidationError):
        example(curves={"train_dpo": [{"step": 1, "loss": "high"}]})


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
    headline, found, reasons = verdict(
        with_policy("DPO", gain=Estimate(value=(low + high) / 2, low=low, high=high, n=256))
    )
    assert found == kind
    assert words in headline
    assert "256 prompts" in reasons[0]
    assert any("contains zero" in reason for reason in reasons) == (kind == "unclear")


def test_verdict_without_a_comparison() -> None:
    assert verdict(example(steps=2, evaluation=None)).kind == "unclear"
    assert verdict(with_policy("DPO", gain=None)).kind == "unclear"
    refused = _gate()[0].model_copy(update={"refused": True})
    headline, kind, _ = verdict(example(steps=2, gate=[refused], evaluation=None))
    assert (headline, kind) == ("The data gate refused train pairs", "bad")


def test_verdict_names_a_learned_reward() -> None:
    proxy = _evaluation().model_copy(update={"reward_is_true": False})
    assert any("learned proxy" in r for r in verdict(example(steps=2, evaluation=proxy)).reasons)
    assert not any("learned proxy" in r for r in verdict(example(steps=2)).reasons)


def test_a_healthy_run_raises_no_alarm() -> None:
    assert alarms(example()) == []


def _curve(**metrics: list[float]) -> dict[str, list[dict[str, float]]]:
    length = len(next(iter(metrics.values())))
    rows = [
        {"step": float(i), **{k.replace("__", "/"): v[i] for k, v in metrics.items()}} for i in range(length)
    ]
    return {"train_dpo": rows}


FALLING, RISING = [float(-i) for i in range(20)], [float(i) for i in range(20)]
BAD_ACCURACY = [0.8] * 10 + [0.6] * 10


@pytest.mark.parametrize(
    ("report", "name"),
    [
        (example(curves=_curve(logps__chosen=FALLING, rewards__chosen=FALLING)), "Likelihood displacement"),
        (with_policy("DPO", kl=estimate(10.1, 1)), "KL run-away"),
        (with_policy("PPO", kl=estimate(10.1, 1)), "KL run-away"),
        (with_policy("PPO", kl=estimate(2.0, 0.3)), "KL run-away"),
        (with_policy("DPO", entropy=1.4), "Diversity collapse"),
        (with_policy("PPO", distinct_2=0.3), "Diversity collapse"),
        (with_policy("DPO", length=estimate(66, 2)), "Length drift"),
        (with_policy("DPO", length=estimate(29, 2)), "Length drift"),
        (with_policy("DPO", accuracy=estimate(0.45, 0.03)), "Reward without accuracy"),
        (example(curves=_curve(rewards__accuracies=BAD_ACCURACY)), "Reward without accuracy"),
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
        example(curves=_curve(rewards__accuracies=BAD_ACCURACY[::-1])),
        with_policy("DPO", kl=estimate(9.9, 1)),
        with_policy("PPO", kl=estimate(2.1, 0.3)),
        with_policy("DPO", entropy=1.45, distinct_2=0.31, length=estimate(65, 2)),
    ],
)
def test_alarms_stay_quiet_just_inside_the_limits(report: RunReport) -> None:
    assert alarms(report) == []


def test_gate_warnings_are_an_alarm_and_notes_are_not() -> None:
    findings = [f.model_copy(update={"passed": False}) for f in _gate()[0].findings]
    (alarm,) = alarms(example(steps=2, gate=[_gate()[0].model_copy(update={"findings": findings})]))
    assert "length_bias (warning, 2,611 rows)" in alarm.message
    assert "prompt_leakage" not in alarm.message  # severity info


def test_findings_of_the_gate_fit_the_report() -> None:
    found = Finding(
        rule="pairs/length_bias", severity="warning", passed=False, observed=0.71,
        threshold={"max_share": 0.65}, rows=[3, 9], message="chosen is longer", remedy="balance the lengths",
    )  # fmt: skip
    finding = GateFinding.model_validate(found.model_dump())
    assert (finding.measured, finding.limit) == (0.71, "max_share 0.650")
    skipped = GateFinding.model_validate(
        found.model_copy(update={"skipped": True, "passed": True}).model_dump()
    )
    page = render(example(steps=2, gate=[GateRow(subject="pairs", rows=10, findings=[finding, skipped])]))
    assert "max_share 0.650" in page
    assert '<span class="mark">skipped</span>' in page


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


# -------------------------------------------------------------------------------------- terminal, Markdown


def _terminal(report: RunReport) -> str:
    out = io.StringIO()
    Console(file=out, width=80, color_system=None).print(terminal_table(report))
    return out.getvalue()


def test_terminal_table_fits_80_columns() -> None:
    text = _terminal(example(steps=20))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for stage in _stages():
        assert stage.name in text
    for word in (
        "DPO scores higher than SFT",
        "+0.523",
        "+0.465 to +0.581",
        "22 min 05 s",
        "cached",
        "74.2%",
    ):
        assert word in text


def test_terminal_shows_alarms_and_does_not_read_markup() -> None:
    report = with_policy("DPO", kl=estimate(14.0, 1))
    named = report.run.model_copy(update={"name": "[red]x[/nope]"})
    text = _terminal(report.model_copy(update={"run": named}))
    assert "! KL run-away: DPO is 14.0 nats from the reference." in text
    assert "[red]x[/nope]" in text


def test_markdown_tables_keep_their_columns_and_escape_markup() -> None:
    text = markdown(hostile())
    outside, command = text.split("## Reproduce")
    assert "<script" not in outside.replace("\\<", "")
    tables = re.findall(r"(?:^\|.*\n)+", outside, flags=re.M)
    assert len(tables) == 3
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    fence = re.search(r"^(`+)sh$", command, flags=re.M)
    assert fence
    assert len(fence[1]) == 4  # the command holds three


def test_markdown_of_the_example() -> None:
    text = markdown(example(steps=20))
    assert text.startswith("# DPO scores higher than SFT\n")
    assert "| Gain over SFT | – | +0.523 \\[+0.465 to +0.581\\] | +0.584 \\[+0.529 to +0.639\\] |" in text
    assert "dpo run imdb_sentiment --set dpo.beta=0.1 --set seed=7" in text


# ------------------------------------------------------------------------------------------------- the page


class Outline(HTMLParser):
    """What the page is made of; fails on tags that do not nest."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[tuple[int, str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and re.fullmatch("h[1-6]", self.open[-1]):
            level, text = self.headings[-1]
            self.headings[-1] = (level, text + data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page() -> str:
    return render(example())


def test_page_order(page: str) -> None:
    headings = Outline(page).headings
    assert headings[0] == (1, "DPO scores higher than SFT")
    assert [text for level, text in headings if level == 2] == [
        "Policies", "Reward against KL", "Training", "Data gate", "Samples", "Stages and cost", "Lineage",
        "Reproduce",
    ]  # fmt: skip
    levels = [level for level, _ in headings]
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_page_is_accessible_in_structure(page: str) -> None:
    outline = Outline(page)
    assert outline.all("html")[0]["lang"] == "en"
    assert any(meta.get("name") == "viewport" for meta in outline.all("meta"))
    assert len(outline.all("table")) == len(outline.all("caption")) == 4
    assert all(cell.get("scope") in ("col", "row") for cell in outline.all("th"))
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    assert len(ids) == len(set(ids))
    named = [a for _, a in outline.tags if "aria-labelledby" in a]
    assert all(part in ids for a in named for part in str(a["aria-labelledby"]).split())
    local = [str(a["href"])[1:] for _, a in outline.tags if str(a.get("href", "")).startswith("#")]
    assert local
    assert set(local) <= set(ids)
    figures = [a for a in outline.all("svg") if a.get("role") == "img"]
    assert len(figures) == len(outline.all("title")) - 1 == 13
    assert all(a.get("tabindex") == "0" for a in outline.all("div") if a.get("class") == "scroll")


def test_page_fetches_nothing_and_is_small() -> None:
    page = render(example(steps=5000))
    outline = Outline(page)
    assert not outline.all("script")
    assert not [a for _, a in outline.tags if "src" in a]
    assert [a["href"] for a in outline.all("link")] == ["data:,"]
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    assert len(page.encode()) < 400_000


def test_page_says_the_numbers(page: str) -> None:
    for word in (
        "+0.523",
        "+0.465 to +0.581",
        "74.2%",
        "n = 1,024",
        "2.6 PFLOP",
        "22 GiB",
        "−0.210",
        "champion",
    ):
        assert word in page, word
    assert "dpo run imdb_sentiment --set dpo.beta=0.1 --set seed=7" in page
    assert _digest("train_dpo") in page  # whole, so that it can be copied
    assert "No alarms." in page
    assert "(empty)" in page


def test_page_is_reproducible(page: str) -> None:
    assert render(example()) == page


def test_page_escapes_everything() -> None:
    page = render(hostile())
    outline = Outline(page)
    assert not outline.all("script")
    assert not outline.all("img")
    assert not [k for _, a in outline.tags for k in a if k.startswith("on")]
    assert not [a for a in outline.all("a") if str(a["href"]).startswith("javascript")]
    assert page.count("&lt;script&gt;") > 8
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    assert len(ids) == len(set(ids))  # two stages share a digest here
    assert "default-src 'none'" in page


def test_page_says_what_is_missing() -> None:
    evaluation = _evaluation()
    no_ppo = [row for row in evaluation.policies if row.name != "PPO"]
    page = render(
        example(evaluation=evaluation.model_copy(update={"policies": no_ppo, "samples": []}), curves={})
    )
    assert "PPO baseline (the run did not evaluate one)" in page
    assert "Training (no training metrics were recorded)" in page
    assert "Samples (no completions were recorded)" in page
    assert 'id="training"' not in page
    assert 'id="samples"' not in page
    assert 'id="frontier"' in page


def test_page_of_a_run_that_only_has_a_name() -> None:
    page = render(RunReport(run=example(steps=2).run))
    assert [text for level, text in Outline(page).headings if level < 3] == [
        "DPO was not evaluated", "Reproduce",
    ]  # fmt: skip
    assert page.count("the run has no evaluation") == 2
    assert "No alarms" not in page  # nothing was measured that could have raised one


def test_page_cuts_long_texts_and_says_so() -> None:
    sample = Sample(prompt="p" * 5000, completions={"SFT": "x"})
    evaluation = _evaluation().model_copy(update={"samples": [sample] * 40})
    page = render(example(steps=2, evaluation=evaluation))
    assert "(3,500 more characters)" in page
    assert f"{MAX_SAMPLES} of 40 recorded prompts" in page
    assert len(re.findall('class="sample"', page)) == MAX_SAMPLES


def test_long_curves_are_averaged_not_cut() -> None:
    rows = [{"step": float(i), "loss": float(i % 2)} for i in range(1000)]
    (figure,) = curve_figures("sft", rows)
    path = max(re.findall(r'<path d="([^"]+)"', figure.svg), key=len)
    assert MAX_POINTS / 2 <= len(re.findall("[ML]", path)) <= MAX_POINTS + 1  # matplotlib repeats the last
    assert "between 0.400 and 0.600, steps 2 to 997" in figure.svg  # means of five neighbours
    assert figure.note == "0.500 → 0.500"


def test_figures_keep_the_digits_of_their_labels() -> None:
    rows = [{"step": float(i), "loss": 0.5 + 0.002 * i} for i in range(20)]
    (figure,) = curve_figures("sft", rows)
    ticks = [float(t) for t in re.findall(r"<text[^>]*>(0\.\d+)</text>", figure.svg)]
    steps = [round(b - a, 4) for a, b in pairwise(ticks)]
    assert len(ticks) > 2
    assert len(set(steps)) == 1  # rounding inside the labels would make the ticks uneven


def test_figures_colour_by_theme_and_follow_it() -> None:
    figures = [f for stage, rows in _curves(30).items() for f in curve_figures(stage, rows)]
    assert [f.title for f in figures if "train_dpo" in f.svg] == [
        "Loss", "Implicit rewards", "Reward margin", "Preference accuracy", "Log-probability of chosen",
        "Gradient norm",
    ]  # fmt: skip
    for figure in figures:
        bare = re.sub(r"var\(--\w+, #[0-9a-f]{6}\)", "", figure.svg)
        assert re.findall(r"#[0-9a-f]{6}\b(?!-)", bare) == []


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_colours_reach_wcag_aa_in_both_themes(page: str) -> None:
    themes = [
        re.sub(r"#(.)(.)(.);", r"#\1\1\2\2\3\3;", css) for css in re.findall(r":root \{(.*?)\}", page, re.S)
    ]
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--(\w+): #([0-9a-f]{6})", theme))
        for ground in ("paper", "raised"):
            for ink in ("ink", "muted", "blue", "orange", "green", "red", "amber"):
                pair = sorted((_luminance(colours[ink]), _luminance(colours[ground])))
                assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (ink, ground)
