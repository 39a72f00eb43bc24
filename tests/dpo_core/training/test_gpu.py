"""What differs on a GPU: FlexAttention on packs, compiled layers of one shape, a training job over NCCL."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from dpo_core.scoring.autocast import autocast
from dpo_core.scoring.branch_scores import branch_scores
from dpo_core.scoring.layout import pack, pad
from dpo_core.training.loop import compile_layers
from tests.dpo_core.scoring.test_layout import SIZES, documents
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.training_jobs import curve, launch, pair_rows, write_job, write_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DEVICE = "cuda"


def llama(heads: int = 2) -> LlamaForCausalLM:
    """Two heads of 16, the least that FlexAttention takes, or four of 8."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_attention_heads": heads})).eval()


def passed(
    layout, precision: str = "fp32", compiled: bool = False, heads: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs, and the gradient of their sum, on the GPU."""
    model = llama(heads).to(DEVICE)
    if compiled:
        compile_layers(model)
    with autocast(precision, DEVICE):
        logps_SL = branch_scores(model, layout.to(DEVICE)).logps_SL
    logps_SL.sum().backward()
    return logps_SL.detach().cpu(), torch.cat([p.grad.flatten() for p in model.parameters()]).cpu()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("heads", [2, 4])
def test_packs_equal_padded_rows(heads, compiled):
    chosen = documents(7, seed=3)
    logps, gradient = passed(pack(chosen, pad_to=256), compiled=compiled, heads=heads)
    padded, padded_gradient = passed(pad(chosen), heads=heads)
    torch.testing.assert_close(logps, padded, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, padded_gradient, rtol=1e-4, atol=1e-4)


def test_packs_keep_a_window_shorter_than_a_document():
    config = MistralConfig(**{**SIZES, "num_attention_heads": 2}, sliding_window=8)
    model = MistralForCausalLM(config).to(DEVICE)
    chosen = documents(7, seed=3)
    with torch.no_grad():
        rows, packs = (
            branch_scores(model, one.to(DEVICE)).logps_SL for one in (pad(chosen), pack(chosen, 256))
        )
    torch.testing.assert_close(packs, rows, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lay_out", [lambda d: pack(d, pad_to=256), pad])
def test_bf16_is_near_fp32_and_its_gradients_are_finite(lay_out):
    """cuDNN attention gives NaN gradients in bf16 with torch 2.13 and is switched off where a job starts."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    layout = lay_out(documents(7, seed=3))
    exact, gradient = passed(layout)
    near, near_gradient = passed(layout, "bf16")
    torch.testing.assert_close(near, exact, rtol=0, atol=0.1)
    assert (near_gradient - gradient).norm() <= 0.02 * gradient.norm()


@pytest.mark.parametrize("heads", [2, 4])
def test_a_training_job_trains_as_on_a_cpu(heads: int, tmp_path: Path, monkeypatch):
    rows, model = pair_rows(16), make_tiny_model(tmp_path / "model", num_attention_heads=heads)
    shard = write_reference(model, rows, tmp_path / "reference")
    settings = {
        "batch_size": 8,
        "pack_tokens": 512,
        "epochs": 3.0,
        "optim": {"learning_rate": 1e-3, "epsilon": 1e-6},
        "engine": {"precision": "fp32", "threads": 1},
    }
    curves = []
    for device in ("gpu", "cpu"):
        if device == "cpu":
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
            monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # this process has told DeepSpeed of the GPU
        job = write_job(tmp_path / device, "dpo", model, rows, reference_logps=str(shard), settings=settings)
        launch(job)
        curves.append(curve(job.parent))
    assert len(curves[0]) == len(curves[1]) == 6
    for gpu, cpu in zip(*curves, strict=True):
        assert gpu["loss"] == pytest.approx(cpu["loss"], abs=1e-4)
        assert gpu["grad_norm"] == pytest.approx(cpu["grad_norm"], rel=1e-3)
