"""Margins by agreement: from the votes in a file to the margin in the loss."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_core import job as train
from dpo_core.errors import RecipeError
from dpo_core.methods.reward import RewardModelConfig
from dpo_core.models.load import load_model
from dpo_core.models.reward_model import RewardModel, bradley_terry_loss
from dpo_core.rewards.model import reward_of
from dpo_core.trainers.reward import RewardTrainer
from tests.support.runs.training_jobs import curve, pair_rows, token_pairs, write_job

ENGINE = {"precision": "fp32", "threads": 1}


def rows_of(*agreements: float | None) -> list[dict[str, Any]]:
    return [r | {"agreement": a} for r, a in zip(pair_rows(len(agreements)), agreements, strict=True)]


def trainer_of(tiny: Path, work: Path, rows: list[dict[str, Any]], **settings: Any) -> RewardTrainer:
    model = RewardModel(load_model(tiny).get_decoder(), torch.Generator().manual_seed(0))
    size = {"batch_size": len(rows), "micro_batch_size": len(rows), "max_steps": 1, "engine": ENGINE}
    config = RewardModelConfig(**(size | settings))
    return RewardTrainer(model, token_pairs(tiny, rows), config, seed=0, work=work)


@pytest.mark.parametrize(
    ("agreement", "margin"), [(1.0, 2.0), (0.75, 1.0), (0.5, 0.0), (None, 0.0), (0.0, -2.0)]
)
def test_the_margin_grows_with_the_votes(tiny: Path, agreement: float | None, margin: float) -> None:
    config = RewardModelConfig(margin="agreement", margin_scale=2.0)
    (pair,) = token_pairs(tiny, rows_of(agreement))
    assert pair.agreement == agreement
    assert config.margin_of(pair.agreement) == pytest.approx(margin)
    assert RewardModelConfig().margin_of(pair.agreement) == 0.0


def test_an_empty_field_of_a_table_is_no_vote(tiny: Path) -> None:
    (pair,) = token_pairs(tiny, rows_of(math.nan))
    assert pair.agreement is None


def test_the_trainer_asks_for_the_margin_of_each_pair(
    alone: None, tiny: Path, tmp_path: Path, monkeypatch
) -> None:
    """Its loss and its gradient are those of the closed form with the votes of each pair, in their order."""
    monkeypatch.setenv("LOCAL_RANK", "0")  # as torchrun sets it
    agreements = [1.0, None, 2 / 3, 0.5, 0.9]
    trainer = trainer_of(tiny, tmp_path, rows_of(*agreements), margin="agreement", margin_scale=3.0)
    pairs = trainer.examples
    with torch.no_grad():
        chosen, rejected = reward_of(
            trainer.module, [p.chosen for p in pairs] + [p.rejected for p in pairs], "fp32"
        ).chunk(2)
    margins = torch.tensor([3 * (2 * (0.5 if a is None else a) - 1) for a in agreements])
    assert margins.unique().numel() == 4
    wanted = bradley_terry_loss(chosen, rejected, margins, 0.01).sum()
    assert not torch.isclose(wanted, bradley_terry_loss(chosen, rejected, None, 0.01).sum(), rtol=1e-2)
    loss, _ = trainer.losses(pairs)
    torch.testing.assert_close(loss, wanted)
    # The bias of the head moves both rewards alike: only the centring term sees it.
    loss.backward()
    wanted_bias = (0.01 * 2 * (chosen + rejected) * 2).sum()
    torch.testing.assert_close(trainer.module.head.bias.grad, wanted_bias[None], rtol=1e-4, atol=1e-5)


def test_a_margin_widens_the_trained_gap(alone: None, tiny: Path, tmp_path: Path) -> None:
    """Through the job: the sure pairs, all else equal, end farther apart than without a margin."""
    rows = rows_of(*([1.0] * 8))
    loop = {"batch_size": 8, "micro_batch_size": 8, "epochs": 30, "engine": ENGINE}
    loop["optim"] = {"learning_rate": 3e-4}
    gaps = {}
    for name, extra in {"none": {}, "agreement": {"margin": "agreement", "margin_scale": 4.0}}.items():
        job = write_job(tmp_path / name, "reward", tiny, rows, settings=loop | extra)
        assert train.main(["--config", str(job)]) == 0
        gaps[name] = curve(tmp_path / name)[-1]["rewards/margins"]
    assert gaps["agreement"] > gaps["none"] + 0.3


def test_a_margin_without_votes_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no training pair has a value of agreement") as caught:
        trainer_of(tiny, tmp_path, rows_of(None, None), margin="agreement")
    assert "reward.model.margin to none" in caught.value.remedy
    with pytest.raises(ValueError, match="margin_scale has no effect, because margin is none"):
        RewardModelConfig(margin_scale=2.0)
