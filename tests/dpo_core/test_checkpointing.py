"""Recomputing the layers in the backward pass changes memory and time, and no gradient."""

from pathlib import Path

import pytest
import torch

from dpo_core.attention import checkpoint_layers
from dpo_core.layout import Document, pack, pad
from dpo_core.models import load_model
from dpo_core.scores import branch_scores

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
