"""KTO and BCO in the real trainer: closed-form first losses, the same step for any split, resume."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deploy.launchers import State
from dpo_core import job as train
from dpo_core.data.tokens.config import TokenConfig
from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.errors import StageFailed
from dpo_core.evaluation.policies import sequence_logps
from dpo_core.examples.unpaired import mismatched, unpaired_examples
from dpo_core.methods.kto import imbalance
from dpo_core.models.load import load_model, load_tokenizer
from dpo_core.reference import LogpShard, sequence_key
from dpo_core.trainers.kto import UnpairedTrainer
from tests.support.golden_objectives import GOLDEN, STEPS, step_of, trainer_of
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.training_jobs import (
    curve,
    launch,
    pair_rows,
    token_examples,
    unpaired_rows,
    write_job,
    write_unpaired_reference,
)

ROWS = unpaired_rows(12)
FIRST = {"kto": 0.5, "bco": math.log(2)}
COUPLING = {"kto": "kl", "bco": "delta"}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model: as a policy beside the tiny reference it makes every log-ratio differ from 0."""
    return make_tiny_model(tmp_path_factory.mktemp("other"), seed=5)


@pytest.fixture(scope="module")
def shard(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference log-probs, of the tiny model."""
    return write_unpaired_reference(tiny, ROWS, tmp_path_factory.mktemp("reference") / "shard")


def lines(work: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


# The loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIRST)
def test_ten_steps_give_the_recorded_values(name: str, alone: None, tiny: Path, shard: Path, tmp_path: Path):
    trainer_of(name, tiny, ROWS, tmp_path, shard=shard, reference_is_start=True).train()
    metrics = lines(tmp_path)
    assert len(metrics) == STEPS
    assert metrics[0]["loss"] == pytest.approx(FIRST[name], abs=1e-5)
    assert metrics[0][COUPLING[name]] == pytest.approx(0, abs=1e-5)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert metrics[-1]["rewards/margins"] > 0.05
    assert (metrics[0]["count/chosen"], metrics[0]["count/rejected"]) == (8, 4)
    for kept, wanted in json.loads(GOLDEN.read_text())[name].items():
        np.testing.assert_allclose(
            [line[kept] for line in metrics], wanted, rtol=2e-4, atol=2e-5, err_msg=kept
        )


def ratios(model: Path, reference: Path, sequences: list[TokenSequence]) -> np.ndarray:
    """log π/π_ref by the evaluation's own path."""
    sums = [
        [float(x.double().sum()) for x in sequence_logps(load_model(m), sequences, "fp32", 256)]
        for m in (model, reference)
    ]
    return np.subtract(*sums)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_the_loss_is_that_of_the_paper_written_out(
    alone: None, tiny: Path, other: Path, shard: Path, tmp_path
):
    """Both losses, z_0 and delta from the models' log-probs alone, with weights that differ."""
    examples = token_examples(tiny, ROWS)
    h = ratios(other, tiny, [e.sequence for e in examples])
    z_0 = max(0.0, float(ratios(other, tiny, mismatched(examples)).mean()))
    good = np.array([e.desirable for e in examples])
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    kto = np.where(good, 1.5 * (1 - sigmoid(0.1 * (h - z_0))), 0.5 * (1 - sigmoid(0.1 * (z_0 - h))))
    delta = 0.1 * h.mean()
    bco = -np.log(sigmoid(np.where(good, 0.1 * h - delta, delta - 0.1 * h)))
    for name, wanted, parameters in (("kto", kto, weights), ("bco", bco, {})):
        work = tmp_path / name
        trainer = trainer_of(name, other, ROWS, work, shard=shard, steps=1, parameters=parameters)
        trainer.train()
        (line,) = lines(work)
        assert line["loss"] == pytest.approx(float(wanted.mean()), rel=1e-5)
        assert line["rewards/chosen"] == pytest.approx(0.1 * h[good].mean(), rel=1e-4)
        assert line["rewards/rejected"] == pytest.approx(0.1 * h[~good].mean(), rel=1e-4)
        assert line[COUPLING[name]] == pytest.approx({"kto": z_0, "bco": delta}[name], rel=1e-4, abs=1e-5)
    assert z_0 > 0.03, "clamped, it would not show which pairs it was taken of"
    assert abs(z_0 - h.mean()) > 0.01


def test_z_0_is_clamped_at_zero_after_the_mean(alone: None, tiny: Path, other: Path, shard: Path, tmp_path):
    """With policy and reference exchanged the mean is negative, though single pairs are not."""
    backwards = write_unpaired_reference(other, ROWS, tmp_path / "shard")
    trainer = trainer_of("kto", tiny, ROWS, tmp_path, shard=backwards, steps=1)
    h = ratios(tiny, other, mismatched(trainer.examples))
    assert h.mean() < 0 < h.max()
    trainer.begin_step(trainer.examples)
    assert float(trainer.kl) == 0.0
    assert not trainer.kl.requires_grad


# However the batch is cut --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIRST)
def test_layout_order_and_split_change_nothing(
    name: str, alone: None, other: Path, shard: Path, tmp_path: Path
):
    """A part without one of the classes is among them."""
    everyone = list(range(12))
    bad = [i for i in everyone if not ROWS[i]["label"]]
    good = [i for i in everyone if ROWS[i]["label"]]
    cases: dict[str, tuple[dict[str, Any], list[list[int]]]] = {
        "packs": ({}, [everyone]),
        "small packs": ({"pack_tokens": 64}, [everyone[::2], everyone[1::2]]),
        "another order": ({}, [everyone[::-1]]),
        "one class a part": ({}, [bad, good]),
        "rows of three": (
            {"pack_tokens": None, "micro_batch_size": 3},
            [everyone[i : i + 3] for i in range(0, 12, 3)],
        ),
        "rows of one": ({"pack_tokens": None, "micro_batch_size": 1}, [[i] for i in everyone]),
    }
    padded = trainer_of(name, other, ROWS, tmp_path / "padded", shard=shard, pack_tokens=None)
    wanted = step_of(padded, [everyone])
    for number, (case, (settings, split)) in enumerate(cases.items()):
        trainer = trainer_of(name, other, ROWS, tmp_path / str(number), shard=shard, **settings)
        loss, gradients = step_of(trainer, split)
        assert loss == pytest.approx(wanted[0], abs=1e-5), case
        for got, expected in zip(gradients, wanted[1], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=case)


STAGED = [
    pytest.param(name, stage, marks=[] if (name, stage) == ("kto", 3) else pytest.mark.slow)
    for name in FIRST
    for stage in range(4)
]


@pytest.mark.parametrize(("name", "stage"), STAGED)
def test_two_ranks_at_every_zero_stage_are_one_process(
    name: str, stage: int, alone: None, tiny: Path, other: Path, tmp_path: Path
) -> None:
    """Through the real entry point, packs on one rank and on two; means over a class are over both ranks.

    At stage 3 the pass before the losses finds the weights cut up and has to gather them. The packs of the
    two runs differ, and so does the order of sums: hence 1e-5 and not equality.
    """
    rows = unpaired_rows(14)
    shard = write_unpaired_reference(tiny, rows, tmp_path / "shard")
    sizes = {"pack_tokens": 80, "batch_size": 14}
    trainer = trainer_of(name, other, rows, tmp_path / "sizes", shard=shard, **sizes)
    order = sorted(trainer.mismatched.values() or trainer.examples, key=trainer.length, reverse=True)
    passes = [len(trainer._passes(order[rank::2])) for rank in (0, 1)]
    assert passes == [2, 1], "one rank has to wait for the other in the pass before the losses"

    def job(processes: int, zero_stage: int) -> Path:
        engine = {"precision": "fp32", "threads": 1, "save_every": 2}
        engine |= {"processes": processes, "zero_stage": zero_stage}
        # A larger epsilon: Adam would blow the last bit of a gradient near zero up to a whole step.
        optim = {"learning_rate": 1e-3, "epsilon": 1e-6}
        loop = {"epochs": 100.0, "max_steps": 3, "objective": name, "optim": optim}
        settings = {
            "policy_is_reference": False,
            "reference_logps": str(shard),
            "settings": {**sizes, **loop, "engine": engine},
        }
        return write_job(tmp_path / str(processes), "kto", other, rows, **settings)

    assert train.main(["--config", str(job(1, 0))]) == 0
    assert launch(job(2, stage), 2) is State.DONE
    one, two = curve(tmp_path / "1"), curve(tmp_path / "2")
    assert len(one) == len(two) == 3
    same = ("loss", COUPLING[name], "rewards/chosen", "rewards/rejected", "count/chosen", "grad_norm")
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in same:
            assert b[key] == pytest.approx(a[key], abs=1e-5, rel=1e-5), key
    ours, theirs = (load_file(tmp_path / n / "out" / "model.safetensors") for n in ("1", "2"))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) <= 1e-5


@pytest.mark.parametrize("name", FIRST)
def test_a_resumed_run_is_the_straight_one(name: str, alone: None, other: Path, shard: Path, tmp_path: Path):
    """Three steps, an end, three more: bit for bit six straight ones, BCO's running mean included."""

    def run(folder: str, steps: int) -> tuple[UnpairedTrainer, list[dict[str, float]]]:
        trainer = trainer_of(
            name, other, ROWS, tmp_path / folder, shard=shard, steps=6, batch_size=4, learning_rate=1e-2
        )
        trainer.total_steps = steps
        trainer.train()
        return trainer, lines(tmp_path / folder)

    straight, wanted = run("straight", 6)
    run("parts", 3)
    resumed, metrics = run("parts", 6)
    for key in ("loss", COUPLING[name], "grad_norm"):
        assert [line[key] for line in metrics] == [line[key] for line in wanted], key
    if name == "bco":
        assert resumed.state() == straight.state()
        assert resumed.seen == 24
        # The running mean, from the rewards that the steps logged.
        sums = [n["rewards/chosen"] * n["count/chosen"] for n in wanted if "rewards/chosen" in n]
        sums += [n["rewards/rejected"] * n["count/rejected"] for n in wanted if "rewards/rejected" in n]
        assert wanted[-1]["delta"] == pytest.approx(sum(sums) / 24, rel=1e-4)
    for key, value in straight.module.state_dict().items():
        assert value.equal(resumed.module.state_dict()[key]), key


@pytest.mark.parametrize("name", FIRST)
def test_a_batch_of_one_class_is_no_nan(name: str, alone: None, tiny: Path, tmp_path: Path):
    rows = [row | {"label": True} for row in ROWS]
    shard = write_unpaired_reference(tiny, rows, tmp_path / "shard")
    trainer_of(name, tiny, rows, tmp_path, shard=shard, steps=3, batch_size=1).train()
    metrics = lines(tmp_path)
    assert all(math.isfinite(value) for line in metrics for value in line.values())
    assert all("rewards/rejected" not in line and "rewards/margins" not in line for line in metrics)
    assert metrics[0]["count/rejected"] == 0


# Its cache ----------------------------------------------------------------------------------------------


def test_the_cached_z_0_is_the_recomputed_one(alone: None, tiny: Path, other: Path, shard: Path, tmp_path):
    """The reference half of z_0 comes from the cache; with the reference in memory it is the same."""
    trainer = trainer_of("kto", other, ROWS, tmp_path, shard=shard)
    pairs = mismatched(trainer.examples)
    cached = LogpShard.open(shard).sums([sequence_key(s) for s in pairs])
    again = [float(x.double().sum()) for x in sequence_logps(load_model(tiny), pairs, "fp32", 64)]
    np.testing.assert_allclose(cached, again, atol=1e-4)
    for some in (trainer.examples, trainer.examples[3:8], trainer.examples[:1]):
        trainer.begin_step(some)
        places = [trainer.examples.index(e) for e in some]
        live = float(ratios(other, tiny, [pairs[i] for i in places]).mean())
        assert float(trainer.kl) == pytest.approx(max(0.0, live), abs=1e-4)


def test_a_cache_without_the_mismatched_pairs_is_refused(alone: None, tiny: Path, tmp_path: Path) -> None:
    from dpo_core.reference.compute import compute

    entries: dict[bytes, Any] = {}
    own = [e.sequence for e in token_examples(tiny, ROWS)]
    compute(load_model(tiny), own, precision="fp32", token_budget=256, save=entries.update)
    LogpShard.build(entries).save(tmp_path / "shard")
    with pytest.raises(StageFailed, match="12 of 24 sequences have no reference log-prob"):
        trainer_of("kto", tiny, ROWS, tmp_path / "kto", shard=tmp_path / "shard")
    trainer_of("bco", tiny, ROWS, tmp_path / "bco", shard=tmp_path / "shard")


@pytest.mark.parametrize("name", FIRST)
def test_a_start_off_the_reference_is_refused(
    name: str, alone: None, other: Path, shard: Path, tmp_path: Path
):
    with pytest.raises(StageFailed, match="policy and reference differ by"):
        trainer_of(name, other, ROWS, tmp_path, shard=shard, reference_is_start=True).train()


# Rows, weights -------------------------------------------------------------------------------------------


def test_pairs_are_split_into_single_answers(tiny: Path) -> None:
    tokenise = Tokenise(load_tokenizer(tiny), TokenConfig(max_length=64, max_prompt_length=32))
    rows = pair_rows(4)
    examples, dropped = unpaired_examples(tokenise, rows)
    pairs, _ = tokenise.pairs(rows)
    assert not dropped
    assert [e.sequence for e in examples] == [s for p in pairs for s in (p.chosen, p.rejected)]
    assert [e.desirable for e in examples] == [True, False] * 4
    assert len({e.id for e in examples}) == 8


def test_rows_that_leave_nothing_are_counted(tiny: Path) -> None:
    tokenise = Tokenise(load_tokenizer(tiny), TokenConfig(max_length=12, max_prompt_length=6))
    long = "word " * 60
    rows = [ROWS[0] | {"prompt": ""}, ROWS[1] | {"completion": "", "ended": False}]
    rows.append(ROWS[2] | {"prompt": long, "completion": long})
    examples, dropped = unpaired_examples(tokenise, rows)
    assert dropped == {"empty_prompt": 1, "empty_completion": 1}
    (cut,) = examples
    assert (len(cut.sequence.prompt), len(cut.sequence)) == (6, 12)
    assert cut.sequence.truncated
    assert cut.sequence.completion[-1] != tokenise.eos


def test_real_kto_rows(shared: Path, tiny: Path) -> None:
    from dpo_core.data.config import DataConfig
    from dpo_core.data.load import load

    frame = load(
        DataConfig(path=str(shared / "data" / "preference" / "llamafactory_kto_en_demo.json.gz"))
    ).frame
    tokenise = Tokenise(load_tokenizer(tiny), TokenConfig(max_length=512, max_prompt_length=256))
    examples, dropped = unpaired_examples(tokenise, frame.head(60).to_dict("records"))
    assert not dropped
    assert sum(e.desirable for e in examples) == int(frame.head(60)["label"].sum())
    pairs = mismatched(examples)
    assert not {e.sequence for e in examples} & set(pairs)
    assert max(map(len, pairs)) <= max(len(e.sequence) for e in examples) <= 512


@pytest.mark.parametrize(
    ("weights", "counts", "says"),
    [
        ((1.0, 1.0), (10, 10), None),
        ((1.0, 1.0), (40, 30), None),
        ((1.0, 1.0), (41, 30), "is 1.37 with 41 desirable and 30 undesirable"),
        ((1.0, 1.0), (29, 30), "set desirable_weight to 1.03"),
        ((1.0, 1.0), (10, 100), "set desirable_weight to 10."),
        ((10.0, 1.0), (10, 100), None),
        ((1.0, 1.0), (5, 0), "no undesirable example"),
        ((1.0, 1.0), (0, 5), "no desirable example"),
    ],
)
def test_weights_outside_the_papers_band_are_named(weights, counts, says) -> None:
    named = dict(zip(("desirable_weight", "undesirable_weight"), weights, strict=True))
    warning = imbalance(named, *counts)
    assert warning is None if says is None else says in f"{warning}."
    assert imbalance({"beta": 0.1}, *counts) is None, "BCO has no class weights"


def test_the_trainer_warns_of_them(alone: None, tiny: Path, shard: Path, tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="dpo_core.trainers.kto"):
        trainer_of("kto", tiny, ROWS, tmp_path, shard=shard)
    assert "is 2 with 8 desirable and 4 undesirable" in caplog.text
