"""FLOPs that every trainer counts for a step, against torch's counter of matrix products."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dpo_core import job as train
from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.methods.reward import RewardModelConfig
from dpo_core.methods.sft import SftConfig
from dpo_core.models.load import load_model
from dpo_core.models.lora import add_lora
from dpo_core.models.lora_config import LoraConfig
from dpo_core.models.reward_model import RewardModel
from dpo_core.rewards.model import score, scoring_flops
from dpo_core.scoring import flops as cost
from dpo_core.scoring.completion_scores import completion_logps, logprob_flops
from dpo_core.scoring.document import Document
from dpo_core.scoring.model_shape import shape_of
from dpo_core.trainers.reward import RewardTrainer
from dpo_core.trainers.sft import Demonstration, SftTrainer
from dpo_core.training.batches import PackedBatches, PaddedBatches
from tests.support.golden_objectives import trainer_of
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.killed_job import kill_after
from tests.support.runs.training_jobs import (
    curve,
    launch,
    pair_rows,
    token_pairs,
    unpaired_rows,
    write_job,
    write_reference,
    write_unpaired_reference,
)

ROWS, UNPAIRED = pair_rows(12), unpaired_rows(12)
PADDED: dict[str, Any] = {"pack_tokens": None, "micro_batch_size": 4}
ENGINE = {"precision": "fp32", "threads": 1}
STEP = {"batch_size": 12, "micro_batch_size": 4, "engine": ENGINE}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that matrices and not the turning of positions decide."""
    return make_tiny_model(tmp_path_factory.mktemp("wide"), hidden_size=64, intermediate_size=128)


def measured(work: Any) -> float:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def check(trainer: Any, rel: float = 0.02) -> None:
    """A whole step of the real trainer: all that it computes is counted, and nothing else."""
    counts: dict[str, float] = {}
    real = measured(lambda: counts.update(trainer._step(0)))
    assert counts["flops"] == pytest.approx(real, rel=rel)


def shard_of(model: Path, name: str, folder: Path) -> tuple[list[dict[str, Any]], Path]:
    if name in ("kto", "bco"):
        return UNPAIRED, write_unpaired_reference(model, UNPAIRED, folder / "shard")
    return ROWS, write_reference(model, ROWS, folder / "shard")


# A pass more for TDPO's and TR-DPO's reference, a scored prompt for ORPO in full, a coupling pass for KTO.
PACKS: dict[str, Any] = {"pack_tokens": 96}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, PACKS) for name in ("dpo", "tdpo2", "tr_dpo", "wpo", "orpo_full", "kto", "bco")),
        *((name, PADDED) for name in ("dpo", "orpo_full", "kto")),
    ],
)
def test_a_step_of_preferences(name: str, layout: dict[str, Any], alone, wide, tmp_path):
    rows, shard = shard_of(wide, name, tmp_path)
    trainer = trainer_of(name, wide, rows, tmp_path, shard=shard, live=wide, **layout)
    assert trainer.batches.micro_batches > 1
    check(trainer)


@pytest.mark.parametrize("name", ["dpo", "tdpo2", "tr_dpo"])
def test_logits_that_are_computed_again(name: str, alone, wide, tmp_path, monkeypatch):
    """The KL needs the reference's distribution again, its log-probs alone do not."""
    monkeypatch.setattr(cost, "KEEP_LOGITS_BYTES", 0)
    rows, shard = shard_of(wide, name, tmp_path)
    check(trainer_of(name, wide, rows, tmp_path, shard=shard, live=wide))


def demonstrations(model: Path) -> list[Demonstration]:
    return [Demonstration(p.id, p.chosen) for p in token_pairs(model, ROWS)]


@pytest.mark.parametrize("layout", [{"pack_tokens": 128}, PADDED], ids=["packs", "rows"])
def test_a_step_of_sft(layout: dict[str, Any], alone, wide, tmp_path):
    config = SftConfig(**(STEP | layout))
    check(SftTrainer(load_model(wide).train(), demonstrations(wide), config, seed=0, work=tmp_path))


def test_layers_that_run_again(alone, wide, tmp_path):
    config = SftConfig(**(STEP | {"engine": ENGINE | {"gradient_checkpointing": True}}))
    trainer = SftTrainer(load_model(wide).train(), demonstrations(wide), config, seed=0, work=tmp_path)
    assert trainer.shape.layers == 2
    check(trainer, rel=0.06)  # torch leaves each layer's last product out of its second run


def test_low_rank_additions_to_frozen_weights(alone, wide, tmp_path):
    pytest.importorskip("peft")
    config = SftConfig(**STEP, lora=LoraConfig(rank=4))
    model = load_model(wide)
    add_lora(model, LoraConfig(rank=4), seed=0)
    trainer = SftTrainer(model.train(), demonstrations(wide), config, seed=0, work=tmp_path)
    assert 0 < trainer.shape.frozen_trunk < trainer.shape.trunk
    assert trainer.shape.frozen_head == trainer.shape.head
    check(trainer)


def test_a_step_of_a_reward_model(alone, wide, tmp_path):
    """Whole answers are read and one position of each is scored by a head of one row."""
    model = RewardModel(load_model(wide).get_decoder(), torch.Generator().manual_seed(0))
    trainer = RewardTrainer(
        model.train(), token_pairs(wide, ROWS), RewardModelConfig(**STEP), seed=0, work=tmp_path
    )
    assert (trainer.shape.head, trainer.shape.vocabulary) == (64, 1)
    of_language = shape_of(load_model(wide)).as_reward_model()
    assert replace(of_language, parameters=trainer.shape.parameters) == trainer.shape
    check(trainer)


def test_reading_and_scoring_without_training(wide):
    """Completions that share a prompt, and a reward model's pass over them."""
    sequences = [
        TokenSequence(tuple(range(5, 25 + i)), tuple(range(30 + k, 40 + k + i)))
        for i in range(4)
        for k in range(3)
    ]
    model = load_model(wide)
    # Whether prompts can be shared is tried out first, on some small passes.
    assert measured(lambda: logprob_flops(model, sequences, 128)) > 0
    passes: list[Any] = []
    real = measured(lambda: passes.extend(completion_logps(model, sequences, "fp32", 128)))
    assert len(passes) > 1
    assert logprob_flops(model, sequences, 128) == pytest.approx(real, rel=0.02)
    assert logprob_flops(model, [], 128) == 0
    reward = RewardModel(load_model(wide).get_decoder())
    real = measured(lambda: score(reward, sequences, "fp32", 128))
    assert scoring_flops(shape_of(reward), sequences, 128) == pytest.approx(real, rel=0.02)


def test_every_rank_counts_the_passes_of_all(alone):
    lengths = [10 + 7 * i % 23 for i in range(24)]

    def batches(rank: int) -> list[Any]:
        return [
            PaddedBatches(lengths, 8, 2, seed=0, rank=rank, world=2).of_step(1),
            PackedBatches(np.array(lengths), 8, 64, epochs=2, seed=0, rank=rank, world=2).of_step(1),
        ]

    for first, second in zip(batches(0), batches(1), strict=True):
        assert first.all_micro_batches == second.all_micro_batches
        assert sorted(first.micro_batches + second.micro_batches) == sorted(first.all_micro_batches)
        assert first.micro_batches != second.micro_batches


def test_padding_counts_like_any_token():
    documents = [Document((1,) * 10, ((2,) * 4, (2,) * 7)), Document((1,) * 5, ((2,) * 2, (2,) * 3))]
    # 10 + 3 + 6 and 5 + 1 + 2 tokens; a pack of 40 has 13 of padding.
    assert cost.pass_sizes(documents, packed=True) == (27, 19**2 + 8**2, 16)
    assert cost.pass_sizes(documents, packed=True, length=40) == (40, 19**2 + 8**2 + 13**2, 16)
    assert cost.pass_sizes(documents, packed=False) == (4 * 16, 4 * 16**2, 16)


def test_sampling_of_any_lengths():
    shape = cost.Shape(parameters=0, trunk=100, head=50, layers=2, attention=8, vocabulary=10)
    both = cost.generation(shape, [7], 3) + cost.generation(shape, [9], 1)
    assert cost.sampling(shape, [(7, 3), (9, 1)]) == both


# A whole job -------------------------------------------------------------------------------------------


def job(folder: Path, tiny: Path) -> Path:
    settings = {
        "batch_size": 8,
        "epochs": 100.0,
        "max_steps": 6,
        "engine": {"precision": "fp32", "threads": 1, "save_every": 3},
    }
    shard = write_reference(tiny, ROWS, folder / "reference")
    return write_job(folder, "dpo", tiny, ROWS, reference_logps=str(shard), settings=settings)


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_a_job_that_was_killed_tells_the_operations_of_both_parts(alone, tiny, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert train.main(["--config", str(job(straight, tiny))]) == 0
    path = job(killed, tiny)
    kill_after(4, path)
    assert len(curve(killed)) == 4, "the last of them is done again"
    assert train.main(["--config", str(path)]) == 0
    assert result(killed)["flops"] == result(straight)["flops"] > 0
    assert result(straight)["flops"] == sum(line["flops"] for line in curve(straight))
    assert result(straight)["flops"] == pytest.approx(6 * curve(straight)[0]["flops"], rel=0.5)


def test_a_job_tells_operations_and_memory_of_all_its_ranks(tiny, tmp_path):
    """Two processes do the same work, each with half of it, and each has Python and its libraries."""
    for ranks in (1, 2):
        launch(job(tmp_path / str(ranks), tiny), ranks)
    single, double = result(tmp_path / "1"), result(tmp_path / "2")
    assert single["flops"] == double["flops"]
    assert single["peak_memory_bytes"] > 200 << 20
    assert double["peak_memory_bytes"] == pytest.approx(2 * single["peak_memory_bytes"], rel=0.15)
