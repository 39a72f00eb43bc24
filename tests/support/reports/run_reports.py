"""Run reports of synthetic numbers of a realistic size; nothing here was measured."""

import math
import random
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, Literal

from dpo_core.rewards.quality import RewardQuality
from dpo_core.statistics.estimates import Estimate
from expectations.report import Finding
from tasks.reports.run_report import (
    Evaluation,
    GateRow,
    ModelRow,
    PolicyAbout,
    PolicyRow,
    RunCost,
    RunInfo,
    RunReport,
    Sample,
    StageRow,
)
from tests.support.reports.measured import (
    hostile_measured,
    make_comparison,
    make_comparisons,
    make_decision,
    make_suites,
    make_win_rates,
)


def estimate(value: float, half: float, n: int = 256) -> Estimate:
    return Estimate(value=value, low=value - half, high=value + half, n=n)


def make_curves(steps: int) -> dict[str, list[dict[str, float]]]:
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
    return {"prepare-sft": sft, "train-dpo DPO": dpo, "train-ppo PPO": ppo}


def make_policy(method: str, name: str, **changes: Any) -> PolicyAbout:
    """A policy of a method, from SFT and held to it."""
    paired = method == "dpo"
    known: dict[str, Any] = {
        "method": method, "words": "dpo, beta 0.1" if paired else method,
        "objective": "dpo" if paired else "",
        "reward": None if paired else "source", "start": "SFT", "reference": "SFT",
        "stage": f"train-{method} {name}",
    }  # fmt: skip
    return PolicyAbout(**(known | changes))


def make_policies(
    objective: str = "dpo", ppo_reward: Literal["source", "model"] = "source"
) -> dict[str, PolicyAbout]:
    """DPO, with another objective where that is named, and PPO."""
    return {
        "DPO": make_policy("dpo", "DPO", objective=objective, words=f"{objective}, beta 0.1"),
        "PPO": make_policy("ppo", "PPO", reward=ppo_reward),
    }


def digest(name: str) -> str:
    return sha256(name.encode()).hexdigest()


def make_stages() -> list[StageRow]:
    table: list[tuple[str, Any, float, str, int | None, int | None, list[str]]] = [
        ("load-data", "cached", 0.2, "dataset", 4860, None, []),
        ("validate-pairs", "ran", 6.1, "dataset", 4812, None, ["load-data"]),
        ("prepare-sft", "cached", 0.3, "model", None, 134_515_008, ["validate-pairs"]),
        ("cache-reference", "ran", 48.2, "reference-logps", 4812, None, ["validate-pairs", "prepare-sft"]),
        (
            "train-dpo DPO",
            "ran",
            1325.0,
            "model",
            None,
            134_515_008,
            ["prepare-sft", "validate-pairs", "cache-reference"],
        ),
        ("train-ppo PPO", "ran", 2874.5, "model", None, 134_515_008, ["prepare-sft"]),
        (
            "evaluate",
            "ran",
            310.7,
            "evaluation",
            256,
            None,
            ["prepare-sft", "train-dpo DPO", "train-ppo PPO"],
        ),
        ("promote", "skipped", 0.0, "registration", None, None, ["evaluate"]),
    ]
    return [
        StageRow(
            name=name, state=state, seconds=seconds, kind=kind, rows=rows, parameters=parameters,
            sha256=None if state == "skipped" else digest(name), parents=[digest(p) for p in parents],
            uri=f"file:///srv/dpo/runs/artifacts/{kind}/{digest(name)[:16]}",
            mlflow_run_id=digest(name + "run")[:32],
        )
        for name, state, seconds, kind, rows, parameters, parents in table
    ]  # fmt: skip


def make_evaluation() -> Evaluation:
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
                      entropy=2.87, distinct_1=0.214, self_bleu=estimate(21.4, 1.1),
                      predictive_entropy=estimate(2.91, 0.06)),
            PolicyRow(name="DPO", reward=estimate(0.641, 0.044), gain=estimate(0.523, 0.058),
                      kl=estimate(6.21, 0.48), kl_k3=estimate(6.34, 0.41), win_rate=estimate(0.742, 0.041),
                      length=estimate(47.2, 1.6), distinct_2=0.548, accuracy=estimate(0.703, 0.028, 1024),
                      entropy=2.31, distinct_1=0.187, self_bleu=estimate(28.9, 1.4),
                      predictive_entropy=estimate(2.34, 0.07)),
            PolicyRow(name="PPO", reward=estimate(0.702, 0.04), gain=estimate(0.584, 0.055),
                      kl=estimate(4.48, 0.39), kl_k3=estimate(4.55, 0.35), win_rate=estimate(0.765, 0.04),
                      length=estimate(51.9, 1.2), distinct_2=0.431, entropy=1.98,
                      distinct_1=0.141, self_bleu=estimate(41.7, 1.9),
                      predictive_entropy=estimate(2.02, 0.08)),
        ],
        samples=samples,
    )  # fmt: skip


def make_quality(**changes: Any) -> RewardQuality:
    known: dict[str, Any] = {
        "pairs": 512, "accuracy": estimate(0.684, 0.04, 512), "ece": 0.0413, "brier": 0.207, "nll": 0.601,
        "temperature": 1.37, "length_spearman": 0.312, "gap_spearman": -0.084,
    }  # fmt: skip
    return RewardQuality(**(known | changes))


def make_gate() -> list[GateRow]:
    findings = [
        Finding(
            rule="chosen_differs_from_rejected", severity="critical", passed=True,
            threshold={"max_rate": 0.0}, message="they differ in every row, also after truncation",
        ),
        Finding(
            rule="length_bias", severity="warning", passed=True, count=2611, rate=0.537, rows=[3, 17, 40],
            threshold={"max_share": 0.65}, message="chosen is longer in 53.7% of the pairs",
        ),
        Finding(
            rule="prompt_leakage", severity="off", passed=False, count=2, rate=0.0004, rows=[112],
            threshold={"max_rate": 0.0}, message="prompts that also occur in the test set",
        ),
    ]  # fmt: skip
    docs = "file:///srv/dpo/runs/data_docs/index.html"
    return [GateRow(subject="train pairs", rows=4860, dropped=48, docs_uri=docs, findings=findings)]


def example(steps: int = 300, **changes: Any) -> RunReport:
    """A finished run without alarms. `changes` replaces whole parts of the report."""
    started = datetime(2025, 3, 1, 9, 0, tzinfo=UTC)
    seconds = 4576.2
    stages = make_stages()
    parts: dict[str, Any] = {
        "run": RunInfo(
            name="calm-otter-17", recipe="imdb_sentiment", started_at=started,
            finished_at=started + timedelta(seconds=seconds), seconds=seconds, git_commit="3f2a9c1d" * 5,
            command="dpo run imdb_sentiment --set dpo.beta=0.1 --set seed=7",
            mlflow_run_id=digest("run")[:32],
            tracking_uri="sqlite:///runs/mlflow.db", python="3.11.2", platform="Linux-6.1-x86_64",
            hardware="1 × accelerator with 80 GiB, 16 cores, 128 GiB memory",
        ),
        "stages": stages,
        "candidate": "DPO",
        "policies": make_policies(),
        "reference_stage": "prepare-sft",
        "gate": make_gate(),
        "evaluation": make_evaluation(),
        "decision": None,
        "win_rates": make_win_rates(),
        "suites": make_suites(),
        "comparisons": make_comparisons(),
        "curves": make_curves(steps),
        "cost": RunCost(
            seconds=seconds, seconds_by_stage={s.name: s.seconds for s in stages}, tokens_trained=2_417_664,
            flops=2.6e15, peak_memory_bytes=23_622_320_128,
        ),
        "model": ModelRow(
            name="imdb-dpo", version="4", alias="champion", uri="models:/imdb-dpo@champion",
            sha256=digest("train-dpo DPO"),
        ),
        "notes": {"seed": 7, "beta": 0.1},
    }  # fmt: skip
    return RunReport(**(parts | changes))


def decided(promote: bool, **changes: Any) -> RunReport:
    """The example of which it was asked whether its model takes the champion's place."""
    base = example(steps=20)
    assert base.model
    alias = "champion" if promote else "challenger"
    model = base.model.model_copy(update={"alias": alias, "uri": f"models:/imdb-dpo@{alias}"})
    return example(**({"decision": make_decision(promote), "model": model} | changes))


def with_policy(name: str, **changes: Any) -> RunReport:
    """The example with one policy's row changed."""
    evaluation = make_evaluation()
    rows = [r.model_copy(update=changes) if r.name == name else r for r in evaluation.policies]
    return example(steps=20, evaluation=evaluation.model_copy(update={"policies": rows}))


def alarming() -> RunReport:
    """A run that went wrong in every way that the page can show."""
    curves = make_curves(120)
    for row in curves["train-dpo DPO"]:
        row |= {"logps/chosen": -88 - 0.4 * row["step"], "rewards/chosen": -0.02 * row["step"]}
    evaluation = make_evaluation()
    changes: dict[str, dict[str, Any]] = {
        "DPO": {"gain": estimate(0.021, 0.06), "kl": estimate(15.4, 1.1), "length": estimate(88.2, 3),
                "distinct_2": 0.21, "accuracy": estimate(0.44, 0.03)},
    }  # fmt: skip
    rows = [row.model_copy(update=changes.get(row.name, {})) for row in evaluation.policies]
    failed = [finding.model_copy(update={"passed": False}) for finding in make_gate()[0].findings]
    return example(
        reward_model=make_quality(),
        evaluation=evaluation.model_copy(update={"policies": rows, "reward_is_true": False}),
        curves=curves,
        gate=[make_gate()[0].model_copy(update={"findings": failed})],
    )


def coinciding() -> RunReport:
    """Policies that barely moved from SFT and from each other: their marks lie on one another."""
    evaluation = make_evaluation()
    near = {"gain": estimate(0.001, 0.06), "kl": estimate(0.004, 0.02)}
    rows = [r if r.name == "SFT" else r.model_copy(update=near) for r in evaluation.policies]
    return example(steps=2, evaluation=evaluation.model_copy(update={"policies": rows}))


def crowded() -> RunReport:
    """Many suites, policies, judges and subsets with long names, and estimates without any width."""
    policies = ("SFT", "DPO", "PPO", "Online DPO", "GRPO", "champion")
    base, comparison, rate = make_suites(("SFT",)), make_comparison("champion"), make_win_rates()[1]
    names = [f"a subset of questions with a long name, number {i}" for i in range(57)]
    subsets = [m.model_copy(update={"subset": n}) for m in base[1].measures[:1] for n in names]
    suites = [row.model_copy(update={"policy": policy}) for row in base for policy in policies]
    suites += [
        row.model_copy(update={"suite": "many", "title": "A suite of many subsets", "measures": subsets})
        for row in suites[: len(policies)]
    ]
    rows = [
        row.model_copy(update={"subset": names[i], "label": "Words that would refuse, though harmless"})
        for row in comparison.rows[:2]
        for i in range(20)
    ]
    certain = Estimate(value=0.5, low=0.5, high=0.5, n=1)
    rates = [
        rate.model_copy(update={"a": "Online DPO", "b": b, "judge": f"a-judge-with-a-long-name-{i}-instruct"})
        for b in ("SFT", "champion")
        for i in range(6)
    ]
    return example(
        steps=2,
        suites=suites,
        comparisons=[comparison.model_copy(update={"rows": rows})],
        win_rates=[*rates, rate.model_copy(update={"rate": certain, "length_controlled": certain})],
    )


HOSTILE = (
    '<script>alert(1)</script><img src="http://evil.example/x.png" onerror=alert(1)> | `x` [a](http://b) $x$'
)


def hostile() -> RunReport:
    """The example with markup wherever free text can come from data, models or people."""
    base = example(steps=20)
    evaluation = make_evaluation()
    sample = Sample(prompt=HOSTILE, completions={"SFT": HOSTILE, "DPO": HOSTILE}, rewards={"SFT": 0.1})
    finding = (
        make_gate()[0].findings[0].model_copy(update={"message": HOSTILE, "rule": HOSTILE, "passed": False})
    )
    gate = make_gate()[0].model_copy(
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
            **hostile_measured(HOSTILE),
            "gate": [gate],
            "stages": stages,
            "curves": {HOSTILE: base.curves["train-dpo DPO"]},
            "notes": {HOSTILE: HOSTILE},
        }
    )
