"""The estimated memory of a training, compared with real passes and the peaks of real training processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from dpo_core.data.tokens.config import TokenConfig
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.methods.dpo import DpoConfig
from dpo_core.methods.ppo import PpoConfig
from dpo_core.models.load import load_tokenizer
from dpo_core.scoring.attention import checkpoint_layers
from dpo_core.scoring.autocast import autocast
from dpo_core.scoring.branch_scores import branch_scores
from dpo_core.scoring.document import Document
from dpo_core.scoring.layout import Layout, pack, pad
from dpo_core.training.batches import PackedBatches, PaddedBatches
from dpo_core.training.engine import EngineConfig
from dpo_core.training.memory import PROCESS_BYTES, _StorageCounter, step_memory, training_memory
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.training_jobs import text, write_job, write_reference

LLAMA = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
# Its embedding's gradient outweighs the activations of two layers, and not those of all.
WORDY = LlamaConfig(**{**LLAMA.to_dict(), "vocab_size": 4096, "num_hidden_layers": 12})
DOCUMENTS = [Document(tuple(range(1, 40)), (tuple(range(1, 30)), tuple(range(3, 20 + i)))) for i in range(6)]


def counted(config: Any, layout: Layout, engine: EngineConfig) -> int:
    """Peak of what a real step makes, gradients aside."""
    model = LlamaForCausalLM(config).train()
    if engine.gradient_checkpointing:
        checkpoint_layers(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    kept = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    with _StorageCounter([t.untyped_storage() for t in kept]) as living:
        with autocast(engine.precision):
            loss = -branch_scores(model, layout).logps_SL.sum()
        loss.backward()
    return living.peak.all


@pytest.mark.parametrize(
    ("config", "documents", "lay_out", "changes"),
    [
        (LLAMA, 6, pack, {}),
        (LLAMA, 6, pad, {"precision": "fp32"}),
        (LLAMA, 6, pad, {"gradient_checkpointing": True}),
        (WORDY, 1, pack, {"precision": "fp32"}),
        (WORDY, 1, pack, {"gradient_checkpointing": True}),
        (WORDY, 1, pad, {}),
    ],
)
def test_two_fake_layers_predict_all_real_ones(config, documents, lay_out, changes):
    """Each setting with each model, and each layout with each."""
    layout, engine = lay_out(DOCUMENTS[:documents]), EngineConfig(**changes)
    estimate = step_memory(config, layout, engine)
    assert estimate.peak.all == pytest.approx(counted(config, layout, engine), rel=0.03)
    assert estimate.weights.all == 4 * LlamaForCausalLM(config).num_parameters()


def test_what_the_settings_do_to_the_parts():
    def memory(micro_batches: int = 2, references: int = 0, **engine: Any) -> Any:
        settings = EngineConfig(**engine)
        step = step_memory(LLAMA, pack(DOCUMENTS), settings)
        return training_memory(step, settings, micro_batches=micro_batches, references=references)

    plain, size = memory(), 4 * LlamaForCausalLM(LLAMA).num_parameters()
    assert (plain.weights, plain.gradients, plain.optimiser) == (size, size, 2 * size)
    assert plain.total == sum(vars(plain).values()) > PROCESS_BYTES
    assert memory(references=2).total == plain.total + 2 * size
    assert memory(gradient_checkpointing=True).step < 0.6 * plain.step
    assert memory(micro_batches=1).gradients < size
    shared = memory(zero_stage=1, processes=4)
    assert (shared.weights, shared.optimiser) == (size * 5 // 4, size // 2)


# Real training processes ----------------------------------------------------------------------------------

_WATCHED = """
import sys
from dpo_core.job import main
assert main(["--config", sys.argv[1]]) == 0
import torch
if torch.cuda.is_available():
    print("PEAK", torch.cuda.max_memory_allocated())
else:
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    print("PEAK", int(lines["VmHWM"].split()[0]) * 1024)
"""
TOKENS = TokenConfig(max_length=256, max_prompt_length=128)
# 28 M parameters in small blocks; 24 M of which an embedding of 43 MB is the half.
MODELS = {
    "deep": {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8},
    "wide vocabulary": {
        "vocab_size": 32768,
        "hidden_size": 320,
        "intermediate_size": 1280,
        "num_hidden_layers": 6,
    },
}
PLAIN: dict[str, Any] = {"pack_tokens": 512, "engine": {"precision": "fp32"}}
SETTINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "small packs, fp32": ("deep", "dpo", PLAIN),
    "one pack, fp32": ("deep", "dpo", PLAIN | {"pack_tokens": 4096}),
    "one pack, bf16": ("deep", "dpo", {"pack_tokens": 4096, "engine": {"precision": "bf16"}}),
    "padded, fp32": ("deep", "dpo", PLAIN | {"pack_tokens": None}),
    "checkpointing": (
        "deep",
        "dpo",
        {"pack_tokens": 4096, "engine": {"precision": "fp32", "gradient_checkpointing": True}},
    ),
    "ZeRO 1": ("deep", "dpo", {"pack_tokens": 512, "engine": {"precision": "fp32", "zero_stage": 1}}),
    "ZeRO 2": ("deep", "dpo", {"pack_tokens": 512, "engine": {"precision": "fp32", "zero_stage": 2}}),
    "SFT": ("deep", "sft", {"pack_tokens": 512, "engine": {"precision": "fp32"}}),
    "PPO": ("deep", "ppo", {"engine": {"precision": "fp32"}}),
    "large blocks, small packs": ("wide vocabulary", "dpo", PLAIN),
    "large blocks, padded, bf16": (
        "wide vocabulary",
        "dpo",
        {"pack_tokens": None, "engine": {"precision": "bf16"}},
    ),
    "large blocks, SFT": ("wide vocabulary", "sft", {"pack_tokens": 4096, "engine": {"precision": "bf16"}}),
}


def _rows() -> list[dict[str, Any]]:
    return [
        {
            "id": f"pair-{i}",
            "prompt": text(i, 14 + i % 8),
            "chat": False,
            "chosen": " " + text(i + 100, 10 + i % 9),
            "rejected": " " + text(i + 200, 10 + (i + 4) % 9),
            "chosen_ended": True,
            "rejected_ended": True,
        }
        for i in range(48)
    ]


@pytest.fixture(scope="session")
def measured_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Checkpoint and reference log-probs of each model."""
    made = {}
    for name, sizes in MODELS.items():
        folder = tmp_path_factory.mktemp(name.split()[0])
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024}
        model = make_tiny_model(folder / "model", **sizes, **heads)
        made[name] = model, folder
    return made


def _documents(model: Path, kind: str) -> list[Document]:
    tokenise = Tokenise(load_tokenizer(model), TOKENS)
    pairs, _ = tokenise.pairs(_rows())
    if kind == "dpo":
        return [Document(p.chosen.prompt, (p.chosen.completion, p.rejected.completion)) for p in pairs]
    if kind == "sft":
        return [Document(p.chosen.prompt, (p.chosen.completion,)) for p in pairs]
    return [Document(p.chosen.prompt, ((0,) * 24,)) for p in pairs]


def _estimate(model: Path, kind: str, settings: dict[str, Any]) -> int:
    """The estimate, for the fullest micro-batch."""
    documents, gpu = _documents(model, kind), torch.cuda.is_available()
    if kind == "ppo":
        engine = PpoConfig(**settings).engine
        layout, micro_batches = pad(sorted(documents, key=len)[-8:]), 2
    else:
        config = DpoConfig(**settings)
        engine, packed = config.engine, config.pack_tokens is not None
        lengths = np.array([len(d) for d in documents])
        rows = [max(len(d.prompt) + len(b) for b in d.branches) for d in documents]
        seed: dict[str, Any] = {"seed": 3, "rank": 0, "world": 1}
        batches: Any = (
            PackedBatches(lengths, 16, config.pack_tokens, epochs=1, **seed)
            if config.pack_tokens
            else PaddedBatches(rows, 16, 8, **seed)
        )
        micros = [m for step in range(3) for m in batches.of_step(step).micro_batches]
        fullest = max(micros, key=lambda m: sum(lengths[i] for i in m))
        layout = (pack if packed else pad)([documents[i] for i in fullest])
        micro_batches = batches.micro_batches
    step = step_memory(AutoConfig.from_pretrained(model), layout, engine, on_gpu=gpu)
    memory = training_memory(
        # PPO's reference, and its critic with gradients and two moments, as the plan counts them.
        step,
        engine,
        micro_batches=micro_batches,
        references=5 if kind == "ppo" else 0,
        on_gpu=gpu,
    )
    return memory.total


def _peak(model: Path, kind: str, settings: dict[str, Any], reference: Path, work: Path) -> int:
    """What the training process itself took at most."""
    rows, extra = _rows(), {}
    if kind == "dpo":
        extra = {"reference_logps": str(reference)}
    elif kind == "sft":
        rows = [r | {"completion": r["chosen"], "ended": True} for r in rows]
    else:
        reward = Path(__file__).parents[2] / "support" / "runs" / "vowels.py"
        extra = {
            "reference": str(model),
            "sampling": {"max_new_tokens": 24},
            "reward_source": f"{reward}:vowels",
        }
    tokens = TOKENS.model_dump(mode="json")
    job = write_job(work, kind, model, rows, settings=settings, tokens=tokens, **extra)
    done = subprocess.run(
        [sys.executable, "-c", _WATCHED, str(job)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(next(x for x in done.stdout.splitlines() if x.startswith("PEAK")).split()[1])


def _compare(name: str, models: dict[str, tuple[Path, Path]], work: Path, monkeypatch: Any) -> None:
    which, kind, changes = SETTINGS[name]
    model, folder = models[which]
    monkeypatch.setattr("tests.support.runs.training_jobs.TOKENS", TOKENS)
    reference = folder / "reference"
    if kind == "dpo" and not reference.exists():
        write_reference(model, _rows(), reference)
    engine = changes["engine"] | {"threads": 1, "save_every": 99}
    loop: dict[str, Any] = {"batch_size": 16, "micro_batch_size": 8, "max_steps": 4, "epochs": 2}
    if kind == "ppo":
        loop = {"iterations": 2, "episodes": 16, "micro_batch_size": 8, "epochs": 1}
    settings = {**loop, **changes, "engine": engine}
    estimate, peak = _estimate(model, kind, settings), _peak(model, kind, settings, reference, work)
    print(
        f"\n| {name} | {estimate / 2**20:,.0f} | {peak / 2**20:,.0f} | {100 * (estimate / peak - 1):+.1f} % |"
    )
    print(json.dumps({"setting": name, "estimate": estimate, "peak": peak}))
    assert abs(estimate / peak - 1) <= 0.15


@pytest.mark.bench
@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="resident memory of a CPU")
@pytest.mark.parametrize("name", SETTINGS)
def test_the_estimate_is_near_the_measured_peak(name, measured_models, tmp_path, monkeypatch):
    _compare(name, measured_models, tmp_path, monkeypatch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["one pack, bf16", "padded, fp32", "checkpointing", "PPO"])
def test_the_estimate_is_near_the_peak_on_a_gpu(name, measured_models, tmp_path, monkeypatch):
    _compare(name, measured_models, tmp_path, monkeypatch)
