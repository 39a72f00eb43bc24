"""LoRA: starts equal to the model, trains few weights, and is merged into a normal checkpoint."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpo_core import job as train
from dpo_core.errors import RecipeError
from dpo_core.models.load import load_model
from dpo_core.models.lora import add_lora, merge_lora
from dpo_core.models.lora_config import LoraConfig
from tests.support.models.families import make_family
from tests.support.models.tiny import make_tiny_model
from tests.support.runs import training_jobs
from tests.support.runs.training_jobs import curve, pair_rows, write_job

ROWS = pair_rows(16)


def lora_job(folder: Path, tiny: Path, shard: Path, steps: int = 8, **changes: Any) -> Path:
    settings = {
        "batch_size": 8,
        "micro_batch_size": 4,
        "epochs": 100.0,
        "max_steps": steps,
        "parameters": {"beta": 0.5},
        "lora": {"rank": 4},
        "optim": {"learning_rate": 1e-2, "epsilon": 1e-6},
        "engine": {"precision": "fp32", "threads": 1} | changes,
    }
    return write_job(folder, "dpo", tiny, ROWS, reference_logps=str(shard), settings=settings)


@pytest.fixture(scope="module")
def shard(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_jobs.write_reference(tiny, ROWS, tmp_path_factory.mktemp("reference") / "shard")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 25)[None]).logits


def test_without_peft_the_extra_is_named(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RecipeError) as caught:
        add_lora(model, LoraConfig(), seed=0)
    assert "peft is not installed" in caught.value.problem
    assert "dpo-pipeline[lora]" in caught.value.remedy


def test_it_starts_as_the_model_and_merges_into_what_it_became(model: Any, tiny: Path) -> None:
    pytest.importorskip("peft")
    plain = logits(model)
    names = set(model.state_dict())
    add_lora(model, LoraConfig(rank=4), seed=0)
    assert logits(model).equal(plain)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name or "embed" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    changed = logits(model)
    assert float((changed - plain).abs().max()) > 0.1
    merge_lora(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(logits(model), changed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe", "phimoe", "deepseek_v3"])
def test_what_is_merged_and_saved_computes_what_was_trained(family: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = load_model(make_family(tmp_path / "base", family, spread=1.0))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    plain, names = logits(model), set(model.state_dict())
    add_lora(model, LoraConfig(rank=4), seed=0)
    adapted = [n for n, _ in model.named_parameters() if "lora_B" in n]
    fused = family in {"mixtral", "qwen3_moe", "deepseek_v3"}  # those whose experts peft knows
    assert fused == any("experts" in name for name in adapted)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    trained = logits(model)
    assert float((trained - plain).abs().max()) > 0.1 * float(plain.std())
    merge_lora(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(logits(model), trained, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "out")
    again = load_model(tmp_path / "out")
    assert logits(again).equal(logits(model))
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied


def test_a_job_on_experts_writes_its_result(alone: None, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    base = make_family(tmp_path / "base", "qwen3_moe")
    shard = training_jobs.write_reference(base, ROWS, tmp_path / "shard")
    assert train.main(["--config", str(lora_job(tmp_path / "job", base, shard))]) == 0
    lines = curve(tmp_path / "job")
    assert lines[-1]["loss"] < lines[0]["loss"]
    before, after = load_file(base / "model.safetensors"), load_model(tmp_path / "job" / "out").state_dict()
    assert any(n.startswith("model.layers.0.mlp.experts.0") for n in before), "as the source names them"
    written = load_file(tmp_path / "job" / "out" / "model.safetensors")
    assert written.keys() == before.keys()
    assert not any("lora" in name or "base_layer" in name for name in after)


@pytest.mark.parametrize("targets", [("lm_head",), ("embed_tokens",)])
def test_the_head_and_what_is_tied_to_it_are_refused(model: Any, targets: tuple[str, ...]) -> None:
    """The loss reads the weight of the head past an addition; one merged into tied weights changes both."""
    pytest.importorskip("peft")
    with pytest.raises(RecipeError, match="LoRA cannot be added to the output head") as caught:
        add_lora(model, LoraConfig(target_modules=targets), seed=0)
    assert "lora.target_modules" in caught.value.remedy


def test_the_seed_draws_it_and_leaves_other_draws_alone(tiny: Path) -> None:
    pytest.importorskip("peft")
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model = load_model(tiny)
        before = torch.get_rng_state()
        add_lora(model, LoraConfig(rank=2), seed=seed)
        assert torch.get_rng_state().equal(before)
        drawn.append(next(p for n, p in model.named_parameters() if "lora_A" in n))
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])


def test_layers_that_are_not_there_are_told(model: Any) -> None:
    pytest.importorskip("peft")
    with pytest.raises(RecipeError, match="LoRA cannot be added to this model") as caught:
        add_lora(model, LoraConfig(target_modules=("no_such_layer",)), seed=0)
    assert "lora.target_modules" in caught.value.remedy


def test_a_job_writes_a_normal_checkpoint(alone: None, tiny: Path, shard: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    assert train.main(["--config", str(lora_job(tmp_path, tiny, shard))]) == 0
    lines = curve(tmp_path)
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5), "policy = reference at the start"
    assert lines[-1]["loss"] < 0.55
    before, after = load_file(tiny / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert all("_proj" in name for name in changed)
    assert len(changed) == 2 * 7, "each linear layer of both blocks"
    assert not list((tmp_path / "out").glob("adapter*"))
    load_model(tmp_path / "out")


def test_recomputing_and_zero_3_change_nothing(alone: None, tiny: Path, shard: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    courses = []
    for name, engine in {"plain": {}, "both": {"zero_stage": 3, "gradient_checkpointing": True}}.items():
        assert train.main(["--config", str(lora_job(tmp_path / name, tiny, shard, steps=4, **engine))]) == 0
        courses.append(curve(tmp_path / name))
    for ours, theirs in zip(*courses, strict=True):
        for metric in ("loss", "grad_norm", "rewards/margins"):
            assert ours[metric] == pytest.approx(theirs[metric], abs=1e-5)


def test_the_reference_is_never_whatever_the_base_is(alone: None, tiny: Path, tmp_path: Path) -> None:
    """Log-probs of another checkpoint: the base under the adapter must not stand in for it."""
    pytest.importorskip("peft")
    other = make_tiny_model(tmp_path / "other", seed=1)
    stale = training_jobs.write_reference(other, ROWS, tmp_path / "stale")
    assert train.main(["--config", str(lora_job(tmp_path / "job", tiny, stale))]) == 4
    error = json.loads((tmp_path / "job" / "error.json").read_text())
    assert "before the first step policy and reference differ" in error["problem"]
