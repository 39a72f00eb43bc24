"""Recomputing the layers in the backward pass changes memory and time, and no gradient."""

from pathlib import Path

import pytest
import torch

from dpo_core.data.tokens.sequences import TokenPair, TokenSequence
from dpo_core.methods.reward import RewardModelConfig
from dpo_core.models.load import load_model
from dpo_core.models.reward_model import RewardModel
from dpo_core.scoring.attention import checkpoint_layers
from dpo_core.scoring.branch_scores import branch_scores
from dpo_core.scoring.document import Document
from dpo_core.scoring.layout import pack, pad
from dpo_core.trainers.reward import RewardTrainer
from dpo_core.training.engine import EngineConfig

DOCUMENTS = [Document((5, 6, 7), ((8, 9), (10, 11, 12))), Document((13, 14), ((15,), (16, 17)))]


@pytest.mark.parametrize("lay_out", [pack, pad])
def test_gradients_are_those_of_the_kept_activations(tiny: Path, lay_out):
    gradients = []
    for recompute in (False, True):
        model = load_model(tiny).train()
        runs = 0

        def count(*_):
            nonlocal runs
            runs += 1

        model.model.layers[0].self_attn.register_forward_hook(count)
        if recompute:
            checkpoint_layers(model)
        branch_scores(model, lay_out(DOCUMENTS)).logps_SL.sum().backward()
        assert runs == 1 + recompute, "the layers must run once more, and only then"
        gradients.append([p.grad for p in model.parameters()])
    for kept, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, kept)


def test_a_reward_model_trains_alike(tiny: Path, tmp_path: Path, alone, monkeypatch):
    """Through the trainer itself, which has to find the layers inside the reward model."""
    monkeypatch.setenv("LOCAL_RANK", "0")  # as torchrun sets it
    metrics = []
    for recompute in (False, True):
        model = RewardModel(load_model(tiny).get_decoder(), torch.Generator().manual_seed(0))
        engine = EngineConfig(precision="fp32", threads=1, gradient_checkpointing=recompute)
        config = RewardModelConfig(batch_size=2, micro_batch_size=2, max_steps=1, engine=engine)
        pairs = [
            TokenPair(
                str(i), TokenSequence((5, 6, 7 + i), (8, 9)), TokenSequence((5, 6, 7 + i), (10, 11, 12))
            )
            for i in range(2)
        ]
        trainer = RewardTrainer(model, pairs, config, seed=0, work=tmp_path / str(recompute))
        assert model.backbone.is_gradient_checkpointing == recompute
        metrics.append(trainer.train())
    assert metrics[1]["grad_norm"] == pytest.approx(metrics[0]["grad_norm"], rel=1e-5)
