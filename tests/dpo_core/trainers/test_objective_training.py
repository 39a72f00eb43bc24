"""Every objective on pairs in the real trainer: the same loss and gradient in every layout of a batch.

`golden/objectives.json` holds ten steps of each on a tiny model; `python -m tests.support.golden_objectives`
writes it anew after a deliberate change of a definition.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_core.errors import RecipeError, StageFailed
from dpo_core.methods.dpo import DpoConfig
from dpo_core.methods.kto import KtoConfig
from dpo_core.models.load import load_model
from dpo_core.objectives import get, names
from dpo_core.reference import LogpShard
from dpo_core.trainers.dpo import DpoTrainer
from tests.support.golden_objectives import GOLDEN, GUIDED, STEPS, VARIANTS, step_of, trainer_of
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.training_jobs import (
    build_trainer,
    pair_rows,
    token_pairs,
    unpaired_rows,
    write_job,
    write_reference,
)

ROWS = pair_rows(12)
PAIRWISE = [name for name in names() if get(name).data == "pairs"]
COUPLED = [name for name in PAIRWISE if get(name).batch_coupled]
EVERY = [*PAIRWISE, *VARIANTS]
# One for each kind of input that an objective reads of a batch: both sides' log-probs, a sort over the batch,
# means over tokens, lengths, a side alone, prompts, common beginnings, divergences of tokens, terms, weights.
KINDS = [
    "dpo", "aot", "ipo_mean", "r_dpo", "simpo", "sft_mean", "orpo_full", "ld_dpo", "tdpo2", "rpo", "wpo",
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model: as the reference of a policy it makes every log-ratio differ from 0."""
    return make_tiny_model(tmp_path_factory.mktemp("other"), seed=5)


@pytest.fixture(scope="module")
def shard(other: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reference(other, ROWS, tmp_path_factory.mktemp("reference") / "shard")


@pytest.fixture(scope="module")
def own(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log-probs of the model that training starts from."""
    return write_reference(tiny, ROWS, tmp_path_factory.mktemp("own") / "shard")


@pytest.mark.parametrize("name", KINDS)
def test_layout_order_and_split_change_nothing(name, alone, tiny, other, shard, tmp_path):
    """Packs, padded rows, another order, other micro-batches, a cached and a live reference."""
    packed = trainer_of(name, tiny, ROWS, tmp_path / "a", shard=shard, live=other)
    padded = trainer_of(name, tiny, ROWS, tmp_path / "b", shard=shard, live=other, pack_tokens=None)
    everyone = list(range(len(ROWS)))
    wanted = step_of(padded, [everyone])
    cases = {"packed": (packed, [everyone]), "another order": (packed, [everyone[::-1]])}
    if name not in COUPLED:  # a sort over the batch does not survive its split; tested for a refusal below
        cases |= {
            "packs of three": (packed, [everyone[i : i + 3] for i in range(0, 12, 3)]),
            "rows of five": (padded, [everyone[:5], everyone[5:10], everyone[10:]]),
        }
    for case, (trainer, split) in cases.items():
        loss, gradients = step_of(trainer, split)
        assert loss == pytest.approx(wanted[0], abs=1e-5, rel=1e-5), case
        for got, expected in zip(gradients, wanted[1], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=case)


@pytest.mark.parametrize("name", ["dpo", "ipo_mean", "ld_dpo", "wpo"])
def test_a_live_reference_equals_the_cache(name, alone, tiny, other, shard, tmp_path):
    cached = trainer_of(name, tiny, ROWS, tmp_path / "a", shard=shard)
    live = trainer_of(name, tiny, ROWS, tmp_path / "b", live=other, reference_sync={"every": 100})
    everyone = list(range(len(ROWS)))
    (one, gradients), (two, others) = step_of(cached, [everyone]), step_of(live, [everyone])
    assert one == pytest.approx(two, abs=1e-5, rel=1e-5)
    for got, expected in zip(gradients, others, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", COUPLED)
def test_an_objective_that_compares_the_whole_batch_refuses_a_split_one(name, alone, tiny, shard, tmp_path):
    with pytest.raises(
        RecipeError, match="needs a batch in one forward pass, but it is split into 2"
    ) as caught:
        trainer_of(name, tiny, ROWS, tmp_path, shard=shard, pack_tokens=None, micro_batch_size=6)
    assert "micro_batch_size" in caught.value.remedy


@pytest.mark.parametrize("name", EVERY)
def test_ten_steps_give_the_recorded_values(name, alone, tmp_path, tiny, own, shard):
    golden = json.loads(GOLDEN.read_text())[name]
    guided = name in GUIDED
    start = {"shard": shard if guided else own, "live": tiny, "reference_is_start": not guided}
    trainer_of(name, tiny, ROWS, tmp_path / "work", **start).train()
    lines = [json.loads(line) for line in (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == STEPS
    for name_, wanted in golden.items():
        np.testing.assert_allclose(
            [line[name_] for line in lines], wanted, rtol=2e-4, atol=2e-5, err_msg=name_
        )
    known = get(name).value_at_reference if name in PAIRWISE else None
    value = known(get(name).resolve({})) if known else None
    if value is not None and not guided:
        assert lines[0]["loss"] == pytest.approx(value, rel=1e-5)
    assert lines[-1]["loss"] < lines[0]["loss"], "ten steps at this rate lower every one of them"
    if name == "tr_dpo":
        losses = [line["loss"] for line in lines]
        assert losses[3] > losses[2], "toward ln 2 after the reference has followed"


def test_wpo_weights_pairs_by_the_policys_own_probability(alone, tiny, shard, tmp_path):
    from dpo_core.objectives import combine, wpo_weights

    trainer = trainer_of("dpo", tiny, ROWS, tmp_path, shard=shard, weighting="wpo")
    trainer.begin_step(trainer.examples)
    logps = trainer.logps(trainer.examples)
    loss, _ = trainer.losses(trainer.examples)
    weights_B = wpo_weights(logps)
    assert not weights_B.requires_grad
    assert 0 < weights_B.min() < weights_B.max()
    torch.testing.assert_close(loss, (combine(trainer.terms, logps) * weights_B).sum())


def test_a_moving_reference_follows_the_policy_and_survives_a_resume(alone, tiny, tmp_path):
    """TR-DPO: updates every two steps; three steps, a stop, three more = six straight steps."""
    settings = {"reference_sync": {"every": 2, "mix": 0.6}, "learning_rate": 1e-2}

    def run(folder: Path, steps: int) -> tuple[DpoTrainer, list[float]]:
        trainer = trainer_of(
            "dpo", tiny, ROWS, folder, live=tiny, reference_is_start=True, steps=6, batch_size=4, **settings
        )
        trainer.total_steps = steps
        trainer.train()
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return trainer, [json.loads(line)["loss"] for line in lines]

    straight, losses = run(tmp_path / "straight", 6)
    before = {k: v.clone() for k, v in load_model(tiny).state_dict().items()}
    assert any(not v.equal(before[k]) for k, v in straight.live.state_dict().items())
    run(tmp_path / "parts", 3)
    resumed, parts = run(tmp_path / "parts", 6)
    assert parts == losses
    for key, value in straight.live.state_dict().items():
        assert value.equal(resumed.live.state_dict()[key]), key
    hard, _ = run(tmp_path / "hard", 2)
    mixed = {k: before[k].lerp(v, 0.6) for k, v in hard.module.state_dict().items() if v.is_floating_point()}
    for key, value in mixed.items():
        torch.testing.assert_close(hard.live.state_dict()[key], value)


def test_a_guiding_reference_weighs_pairs_from_the_first_step(alone, tiny, own, shard, tmp_path):
    """Pre-DPO: the first loss is that of the guide's own margins; with the start as guide it is plain DPO."""
    guided = trainer_of("dpo", tiny, ROWS, tmp_path / "guided", shard=shard)
    logps = guided.logps(guided.examples)
    margins_B = (logps.chosen_B - logps.rejected_B) - (logps.ref_chosen_B - logps.ref_rejected_B)
    wanted = torch.nn.functional.softplus(-0.1 * margins_B).mean()
    loss, _ = step_of(guided, [list(range(len(ROWS)))])
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert abs(loss - np.log(2)) > 1e-4
    guided.check_start()  # nothing to compare: policy and reference differ on purpose
    unguided = trainer_of("dpo", tiny, ROWS, tmp_path / "unguided", shard=own, reference_is_start=True)
    assert step_of(unguided, [list(range(len(ROWS)))])[0] == pytest.approx(np.log(2), abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective": "kto"}, "objective 'kto' learns from single answers: set method to kto"),
        ({"plus": [{"objective": "bco"}]}, "objective 'bco' learns from single answers"),
        ({"weight": 2.0}, "weight has no effect, because plus adds"),
        ({"objective": "simpo", "reference_sync": {}}, "has no reference that reference_sync could move"),
        ({"reference_sync": {}, "engine": {"zero_stage": 3}}, "choose zero_stage 0 to 2"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        DpoConfig(**settings)


@pytest.mark.parametrize("name", ["plus", "weighting", "reference_sync", "weight"])
def test_a_method_on_single_answers_has_no_settings_of_pairs(name):
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        KtoConfig(**{name: None})
    with pytest.raises(ValueError, match="objective 'dpo' learns from pairs: set method to dpo"):
        KtoConfig(objective="dpo")


@pytest.mark.parametrize(("method", "rows"), [("dpo", ROWS), ("kto", unpaired_rows(4))])
def test_a_missing_cache_is_named(method, rows, tiny, tmp_path):
    with pytest.raises(StageFailed, match=f"the {method} job file has no reference_logps"):
        build_trainer(write_job(tmp_path, method, tiny, rows))


def test_an_objective_without_a_reference_needs_no_cache(alone, tiny, tmp_path):
    trainer_of("simpo", tiny, ROWS, tmp_path)


def test_a_cache_of_other_pairs_is_refused(alone, tiny, other, tmp_path):
    short = write_reference(other, ROWS[:11], tmp_path / "short")
    with pytest.raises(StageFailed, match="2 of 24 sequences have no reference log-prob"):
        trainer_of("ld_dpo", tiny, ROWS, tmp_path / "work", shard=short)
    assert len(token_pairs(tiny, ROWS)) == 12
    assert len(LogpShard.open(short).keys_N2) == 22
