"""Compiled decoder layers give the numbers of plain ones and the same names in a checkpoint."""

import shutil

import pytest
import torch

from dpo_core.scoring.branch_scores import branch_scores
from dpo_core.scoring.layout import pack
from dpo_core.training.loop import compile_layers
from tests.dpo_core.scoring.test_layout import documents, llama


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
def test_compiled_layers_give_the_same_numbers_on_packs_of_any_length():
    plain, compiled = llama(), llama()
    compile_layers(compiled)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for seed in range(3):
        layout, gradients = pack(documents(5 + seed, seed)), []
        for model in (plain, compiled):
            model.zero_grad()
            logps_SL = branch_scores(model, layout).logps_SL
            logps_SL.sum().backward()
            gradients.append([logps_SL.detach(), *(p.grad for p in model.parameters())])
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
