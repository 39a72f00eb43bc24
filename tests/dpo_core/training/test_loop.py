"""Training through the real entry point on a tiny model: known values, invariance, exact resume, failures."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from deploy.launchers import LocalLauncher, State
from deploy.launchers.job_server_client import JobServer
from dpo_core import job as train
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.models.load import load_model, load_tokenizer
from dpo_core.models.source import weights_digest
from dpo_core.training.batches import Order
from dpo_core.training.config import LoopConfig, OptimConfig
from dpo_core.training.engine import MetricsFile
from dpo_core.training.schedule import LearningRateSchedule
from tests.support.models.logps import full_logps
from tests.support.models.tiny import make_tiny_model
from tests.support.runs import training_jobs
from tests.support.runs.training_jobs import (
    TOKENS,
    build_trainer,
    curve,
    demonstrations,
    launch,
    pair_rows,
    spoil,
    token_pairs,
    wait_until,
    write_job,
)

STEPS = 40
ROWS = pair_rows(16)


def loop(**changes: Any) -> dict[str, Any]:
    """Settings of a short fp32 run; every number is the same however the batch is cut."""
    engine = {"precision": "fp32", "threads": 1, "save_every": 5} | changes.pop("engine", {})
    optim = {"learning_rate": 1e-3, "schedule": "cosine", "warmup_fraction": 0.1} | changes.pop("optim", {})
    sizes = {"batch_size": 8, "micro_batch_size": 2, "epochs": 100.0, "max_steps": STEPS, "pack_tokens": None}
    return sizes | changes | {"engine": engine, "optim": optim}


@pytest.fixture(scope="module")
def shard(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reference log-probs of `ROWS` under the tiny model."""
    return training_jobs.write_reference(tiny, ROWS, tmp_path_factory.mktemp("reference") / "shard")


def dpo_job(folder: Path, tiny: Path, shard: Path, rows: Any = ROWS, **changes: Any) -> Path:
    settings = loop(**changes) | {"parameters": {"beta": 0.5}}
    return write_job(folder, "dpo", tiny, rows, reference_logps=str(shard), settings=settings)


@pytest.fixture(scope="module")
def straight(tiny: Path, shard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of an uninterrupted DPO run under torchrun: 4 micro-batches of 2 pairs a step."""
    work = tmp_path_factory.mktemp("straight")
    assert launch(dpo_job(work, tiny, shard)) is State.DONE
    return work


def series(work: Path, *names: str) -> dict[str, list[float]]:
    return {name: [line[name] for line in curve(work)] for name in names}


EXACT = ("step", "loss", "grad_norm", "learning_rate", "rewards/margins", "logps/chosen", "num_tokens")


# What a run must be worth ------------------------------------------------------------------------------


def test_the_first_step_is_worth_ln_2(straight: Path) -> None:
    first = curve(straight)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    for name in ("rewards/margins", "rewards/chosen", "rewards/rejected"):
        assert first[name] == pytest.approx(0.0, abs=1e-5)
    assert first["grad_norm"] > 0


def test_training_goes_where_the_pairs_point(straight: Path, tiny: Path) -> None:
    lines = curve(straight)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < 0.5
    assert lines[-1]["rewards/margins"] > 0.5
    assert lines[-1]["rewards/accuracies"] == 1.0
    assert lines[-1]["epoch"] == STEPS * 8 / 16
    result = json.loads((straight / "result.json").read_text())["metrics"]
    assert result["loss"] == lines[-1]["loss"]
    # The written model is the trained one, loadable, with its tokenizer.
    assert weights_digest(straight / "out") != weights_digest(tiny)
    load_tokenizer(straight / "out")
    margins = []
    for folder in (straight / "out", tiny):
        model = load_model(folder)
        with torch.no_grad():
            sums = [
                [float(full_logps(model, s).sum()) for s in (p.chosen, p.rejected)]
                for p in token_pairs(tiny, ROWS)
            ]
        margins.append(np.mean([w - r for w, r in sums]))
    assert margins[0] - margins[1] > 2


def test_the_learning_rate_follows_its_schedule(straight: Path) -> None:
    rates = series(straight, "learning_rate")["learning_rate"]
    assert rates[:4] == pytest.approx([1e-3 * (i + 1) / 4 for i in range(4)])
    assert rates[4:] == pytest.approx(
        [5e-4 * (1 + math.cos(math.pi * i / (STEPS - 4))) for i in range(STEPS - 4)]
    )


# However the batch is cut ---------------------------------------------------------------------------------


def assert_same_course(work: Path, other: Path, steps: int) -> None:
    names = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "learning_rate")
    ours, theirs = series(work, *names), series(other, *names)
    for name in names:
        got, wanted = np.array(ours[name][:steps]), np.array(theirs[name][:steps])
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5, err_msg=name)


def run_here(job: Path) -> int:
    """The entry point of a rank, in this process."""
    return train.main(["--config", str(job)])


def test_accumulation_changes_nothing(
    alone: None, straight: Path, tiny: Path, shard: Path, tmp_path: Path
) -> None:
    job = dpo_job(tmp_path, tiny, shard, micro_batch_size=8)
    assert run_here(job) == 0
    assert_same_course(tmp_path, straight, steps=8)


def test_packs_of_any_size_train_like_rows(alone: None, tiny: Path, shard: Path, tmp_path: Path) -> None:
    """The batch is the whole set, so that padded rows meet the same pairs in every step."""
    whole = {"batch_size": 16, "micro_batch_size": 4, "max_steps": 5}
    assert run_here(dpo_job(tmp_path / "rows", tiny, shard, **whole)) == 0
    for size in (4096, 128):
        work = tmp_path / str(size)
        assert run_here(dpo_job(work, tiny, shard, **whole, pack_tokens=size)) == 0
        assert_same_course(work, tmp_path / "rows", steps=5)
        assert curve(work)[-1]["epoch"] == 5


def test_packs_of_a_part_are_those_of_the_plan(alone: None, tiny: Path, shard: Path, tmp_path: Path) -> None:
    """One rank and two see the same pairs in every step, across epochs."""
    works = [tmp_path / "one", tmp_path / "two"]
    for work, processes in zip(works, (1, 2), strict=True):
        settings = {"pack_tokens": 96, "max_steps": 6, "batch_size": 6, "engine": {"processes": processes}}
        job = dpo_job(work, tiny, shard, **settings)
        assert (launch(job, processes) is State.DONE) if processes > 1 else (run_here(job) == 0)
    assert_same_course(works[1], works[0], steps=6)


def test_a_batch_that_does_not_divide_into_micro_batches_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"batch_size 8 is not a multiple of .* = 6"):
        LoopConfig(batch_size=8, micro_batch_size=3, engine={"processes": 2})


def test_the_mean_of_sft_is_over_tokens_whatever_the_micro_batches(
    alone: None, tiny: Path, tmp_path: Path
) -> None:
    rows = demonstrations(ROWS[:8])
    works = []
    for micro in (8, 2, 1):
        works.append(tmp_path / str(micro))
        settings = loop(micro_batch_size=micro, max_steps=6, optim={"learning_rate": 2e-3})
        assert run_here(write_job(works[-1], "sft", tiny, rows, settings=settings)) == 0
    for work in works[1:]:
        assert_same_sft(work, works[0])
    # One batch is the whole set: its loss is minus the mean log-prob of all completion tokens.
    model = load_model(tiny)
    tokenise = Tokenise(load_tokenizer(tiny), TOKENS)
    total, tokens = 0.0, 0
    for row in rows:
        sequence = tokenise.sequence(
            tokenise.prompt(row["prompt"], False), tokenise.completion(row["completion"], True)
        )
        assert sequence is not None
        with torch.no_grad():
            total -= float(full_logps(model, sequence).sum())
        tokens += len(sequence.completion)
    first = curve(works[0])[0]
    assert first["loss"] == pytest.approx(total / tokens, abs=1e-5)
    assert curve(works[0])[-1]["loss"] < first["loss"]


def assert_same_sft(work: Path, other: Path) -> None:
    ours, theirs = series(work, "loss", "grad_norm"), series(other, "loss", "grad_norm")
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)
    np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=1e-5)


def test_a_demonstration_without_a_prompt_is_left_out(alone: None, tiny: Path, tmp_path: Path) -> None:

    rows = [
        {"id": str(i), "prompt": prompt, "chat": False, "completion": " good soup", "ended": True}
        for i, prompt in enumerate(["The", "", "It"])
    ]
    settings = loop(batch_size=2, micro_batch_size=2)
    job = write_job(tmp_path, "sft", tiny, rows, settings=settings)
    trainer = build_trainer(job)
    assert [e.id for e in trainer.examples] == ["0", "2"]


# Kill, stop, go on ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resumed(
    straight: Path, tiny: Path, shard: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[int], list[State]]:
    """The same run, killed with SIGKILL, resumed, stopped with SIGTERM, resumed to its end."""
    work = tmp_path_factory.mktemp("resumed")
    job = dpo_job(work, tiny, shard)
    server = JobServer()
    launcher = LocalLauncher(server=server)
    lengths, states = [], []

    handle = launcher.submit(job, 1, work)
    wait_until((work / "checkpoints" / "step-00000005").exists, "the first checkpoint")
    psutil.Process(int(handle)).kill()
    wait_until(lambda: launcher.poll(handle) is not State.RUNNING, "the end of a killed job")
    lengths.append(len(curve(work)))
    states.append(launcher.poll(handle))

    handle = launcher.submit(job, 1, work)
    wait_until(lambda: _newest(work) >= 15, "a later checkpoint")
    launcher.cancel(handle)
    lengths.append(len(curve(work)))
    states.append(launcher.poll(handle))

    server.close()

    states.append(launch(job))
    lengths.append(len(curve(work)))
    return work, lengths, states


def _newest(work: Path) -> int:
    return max((int(p.name.removeprefix("step-")) for p in work.glob("checkpoints/step-*")), default=0)


def test_a_kill_fails_a_stop_is_reported_and_a_resumed_job_is_done(
    resumed: tuple[Path, list[int], list[State]],
) -> None:
    _, lengths, states = resumed
    assert states == [State.FAILED, State.STOPPED, State.DONE]
    assert 5 <= lengths[0] < STEPS, "the kill came in the middle"
    assert 15 <= lengths[1] < STEPS, "the stop came in the middle"
    assert lengths[2] == STEPS


def test_a_resumed_run_is_the_straight_run_bit_for_bit(
    straight: Path, resumed: tuple[Path, list[int], list[State]]
) -> None:
    work = resumed[0]
    assert series(work, *EXACT) == series(straight, *EXACT)
    ours, theirs = (load_file(w / "out" / "model.safetensors") for w in (work, straight))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].equal(tensor), name


def test_metrics_after_the_checkpoint_are_removed_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": i, "loss": 1.0}) for i in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "lo')
    MetricsFile(path, resume_after=2).write(3, {"loss": 7.0})
    assert [(line["step"], line["loss"]) for line in curve(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 7.0)]


# Refusals and failures ------------------------------------------------------------------------------------


def error_of(work: Path) -> dict[str, Any]:
    return json.loads((work / "error.json").read_text())


def test_a_reference_of_another_model_is_refused(alone: None, tiny: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", seed=1)
    stale = training_jobs.write_reference(other, ROWS, tmp_path / "stale")
    assert run_here(dpo_job(tmp_path / "job", tiny, stale)) == 4
    assert "before the first step policy and reference differ" in error_of(tmp_path / "job")["problem"]
    assert not (tmp_path / "job" / "checkpoints").exists()
    assert not curve(tmp_path / "job")


def test_a_reference_of_other_tokens_is_refused(alone: None, tiny: Path, shard: Path, tmp_path: Path) -> None:
    changed = [ROWS[0] | {"chosen": ROWS[0]["chosen"] + " warm"}, *ROWS[1:]]
    assert run_here(dpo_job(tmp_path, tiny, shard, rows=changed)) == 4
    assert "1 of 32 sequences have no reference log-prob" in error_of(tmp_path)["problem"]


def test_a_loss_that_is_not_finite_names_its_examples_and_keeps_the_checkpoint(
    alone: None, tiny: Path, shard: Path, tmp_path: Path
) -> None:
    """A reference value spoilt on disk, in a pair that is first met in the second step."""
    pairs = token_pairs(tiny, ROWS)
    order = Order(len(pairs), seed=3)
    bad = pairs[order.batch(1, 8)[0]]
    spoil(shard, pairs, bad, tmp_path / "spoilt")
    job = dpo_job(tmp_path / "job", tiny, tmp_path / "spoilt", check_rows=0, engine={"save_every": 1})
    assert run_here(job) == 4
    error = error_of(tmp_path / "job")
    assert error["problem"].startswith("the loss of step 2 is nan; its examples: ")
    named = error["problem"].split(": ")[1].split(", ")
    assert named == [bad.id], "the one to blame, not its whole batch"
    assert [line["step"] for line in curve(tmp_path / "job")] == [1]
    assert (tmp_path / "job" / "checkpoints" / "step-00000001").is_dir()
    assert not (tmp_path / "job" / "result.json").exists()


def test_a_gradient_that_is_not_finite_stops_the_run(
    alone: None, tiny: Path, shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finite loss whose gradient overflows: the square root at 0."""
    from dpo_core import objectives

    def rooted(logps: Any, *, beta: float) -> Any:
        return (logps.chosen_ratio_B.detach() - logps.chosen_ratio_B).sqrt() + beta

    spoilt = replace(objectives.get("dpo"), function=rooted)
    monkeypatch.setattr("dpo_core.objectives.registry.get", lambda name: spoilt)
    assert run_here(dpo_job(tmp_path, tiny, shard, check_rows=0)) == 4
    assert "the gradient norm of step 1 (its examples: pair-" in error_of(tmp_path)["problem"]
    assert not error_of(tmp_path)["resumable"]
    assert not curve(tmp_path)


def test_an_unknown_method_is_an_error(alone: None, tiny: Path, tmp_path: Path) -> None:
    assert run_here(write_job(tmp_path, "dppo", tiny, ROWS)) == 2
    assert "no method 'dppo' (did you mean" in error_of(tmp_path)["problem"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_the_current_step(
    alone: None, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """The test process sends itself in the middle of its own run what torchrun hands on to its ranks."""
    from dpo_core.training.stop import Stopped

    rows = [
        {"id": "a", "prompt": "The soup", "chat": False, "completion": " was good", "ended": True},
        {"id": "b", "prompt": "The film", "chat": False, "completion": " was long", "ended": True},
    ]
    for name, value in {"DPO_LAUNCHED": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    settings = loop(batch_size=2, max_steps=9)
    job = write_job(tmp_path, "sft", tiny, rows, settings=settings)
    trainer = build_trainer(job)
    plain = trainer.losses

    def losses(batch: Any) -> Any:
        if len(curve(tmp_path)) == 3:
            os.kill(os.getpid(), number)
        return plain(batch)

    trainer.losses = losses
    with pytest.raises(Stopped):
        trainer.train()
    assert _newest(tmp_path) == len(curve(tmp_path)) == 4, "the step at hand was finished and saved"


# The reward model -----------------------------------------------------------------------------------------


def test_the_reward_model_separates_what_can_be_separated(alone: None, tiny: Path, tmp_path: Path) -> None:
    from dpo_core.models.reward_model import RewardModel
    from dpo_core.rewards.model import score

    rows = [
        r | {"chosen": f" good {training_jobs.text(i, 3)}", "rejected": f" bad {training_jobs.text(i, 3)}"}
        for i, r in enumerate(ROWS)
    ]
    settings = loop(micro_batch_size=8, max_steps=40, optim={"learning_rate": 3e-3})
    del settings["pack_tokens"]  # rewards are read from padded rows
    assert run_here(write_job(tmp_path, "reward", tiny, rows, settings=settings)) == 0
    lines = curve(tmp_path)
    assert lines[-1]["loss"] < 0.1 < lines[0]["loss"]
    assert json.loads((tmp_path / "out" / "reward.json").read_text()) == {"accuracy": 1.0}
    # Loaded again: the training answers have mean 0 and spread 1, and unseen pairs are separated.
    model = RewardModel.load(tmp_path / "out")
    seen = [s for p in token_pairs(tiny, rows) for s in (p.chosen, p.rejected)]
    rewards = np.array(score(model, seen, "fp32", token_budget=50))
    assert rewards.mean() == pytest.approx(0, abs=1e-3)
    assert rewards.std() == pytest.approx(1, abs=1e-3)
    unseen = [
        r | {"chosen": " good soup and bread", "rejected": " bad soup and bread"} for r in pair_rows(24)[16:]
    ]
    fresh = np.array(
        score(model, [s for p in token_pairs(tiny, unseen) for s in (p.chosen, p.rejected)], "fp32")
    )
    assert (fresh[0::2] > fresh[1::2]).all()


# Order and schedule ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("examples", "size"), [(10, 4), (7, 7), (5, 8), (16, 1)])
def test_every_example_comes_once_an_epoch(examples: int, size: int) -> None:
    order = Order(examples, seed=1)
    stream = [i for step in range(3 * examples) for i in order.batch(step, size)]
    epochs = [stream[k : k + examples] for k in range(0, 3 * examples, examples)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(examples))
    assert epochs[0] != epochs[1], "each epoch is shuffled anew"


def test_the_batch_of_a_step_is_a_function_of_the_step_alone() -> None:
    straight = [Order(10, seed=1).batch(step, 4) for step in range(12)]
    backwards = Order(10, seed=1)
    assert [backwards.batch(step, 4) for step in range(11, -1, -1)] == straight[::-1]
    assert [Order(10, seed=2).batch(step, 4) for step in range(12)] != straight


@pytest.mark.parametrize(
    ("settings", "examples", "steps"),
    [
        ({"epochs": 1.0}, 64, 4),
        ({"epochs": 2.0}, 24, 3),
        ({"epochs": 0.5}, 8, 1),
        ({"epochs": 3.0, "max_steps": 2}, 64, 2),
    ],
)
def test_steps_follow_from_epochs(settings: dict[str, Any], examples: int, steps: int) -> None:
    assert LoopConfig(**settings).steps(examples) == steps


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_the_schedule_rises_then_does_what_its_name_says(kind: Any) -> None:
    factor = LearningRateSchedule(OptimConfig(schedule=kind, warmup_fraction=0.2), total_steps=10)
    assert [factor(0), factor(1), factor(2)] == [0.5, 1.0, 1.0]
    assert factor(6) == {"constant": 1.0, "linear": 0.5, "cosine": pytest.approx(0.5)}[kind]
    assert factor(10) == (1.0 if kind == "constant" else pytest.approx(0.0))
    assert factor(9) > 0, "the last step still moves"
