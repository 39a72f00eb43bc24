"""Every causal architecture in every part of a run, in one process: none may give wrong results silently.

The oracle is transformers itself: plain passes of one row at a time over the checkpoints that the jobs wrote.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_core import job as train
from dpo_core.generation.config import SamplingConfig
from dpo_core.generation.generate import sample
from dpo_core.model_check import check_folder
from dpo_core.models.dropout import disable_dropout
from dpo_core.models.load import load_model
from dpo_core.scoring.completion_scores import completion_logps
from tests.support.models.logps import full_logps, random_sequences
from tests.support.models.tiny import make_tokenizer
from tests.support.models.zoo import build, model_types
from tests.support.runs.online_jobs import online_job
from tests.support.runs.training_jobs import (
    curve,
    pair_rows,
    sft_job,
    token_pairs,
    write_job,
    write_reference,
)

# One of each kind: plain, windows, soft caps, scaled logits, experts, latent attention, other norms and
# positions, states, convolutions, hybrids, old layouts.
REPRESENTATIVE = (
    "llama", "mistral", "gemma2", "gemma3_text", "granite", "cohere2", "qwen3_moe", "deepseek_v3", "gpt2",
    "opt", "falcon", "phi3", "mamba", "lfm2", "qwen3_next",
)  # fmt: skip
QUICK = ("gemma2", "lfm2")
"""Those of the default run: windows, soft caps, convolutions. Tests of LoRA have GPT-2 and experts."""
# Types that a small config builds and that are refused, with a word of the reason.
REFUSED = {
    **dict.fromkeys(("bert", "bert-generation", "big_bird", "camembert", "cpmant"), "bidirectional"),
    **dict.fromkeys(("data2vec-text", "electra", "ernie", "megatron-bert", "prophetnet"), "bidirectional"),
    **dict.fromkeys(("roberta", "roberta-prelayernorm", "roformer", "xlm", "xlm-roberta"), "bidirectional"),
    **dict.fromkeys(("xlm-roberta-xl", "xlnet"), "bidirectional"),
    **dict.fromkeys(("inkling_text", "modernbert-decoder"), "linear head"),
    "moshi": "audio-language",
    **dict.fromkeys(("rembert", "xlstm", "xmod"), "do not run"),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a small model of a type, with the tests' tokenizer."""

    def write(model_type: str) -> Path:
        tokenizer = make_tokenizer()
        end = tokenizer.eos_token_id
        ids = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
        model = build(model_type, vocab_size=len(tokenizer), **ids)
        folder = tmp_path / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return write


ENGINE = {"precision": "fp32", "save_every": 100, "threads": 1}
OPTIM = {"learning_rate": 1e-3, "warmup_fraction": 0.0}


def run(job: Path) -> Path:
    """Run a job in this process; the folder of what it wrote."""
    assert train.main(["--config", str(job)]) == 0
    return job.parent / "out"


def require_plain_logps(folder: Path) -> None:
    """What the product scores of a checkpoint is what transformers gives for each row alone."""
    model = load_model(folder)
    disable_dropout(model)
    sequences = random_sequences(6, 300, seed=2, longest=40)
    packed_logps = {
        i: x for part in completion_logps(model, sequences, "fp32", 4096) for i, x in part.items()
    }
    with torch.no_grad():
        wanted = [full_logps(model, sequence) for sequence in sequences]
    for index, logps in enumerate(wanted):
        torch.testing.assert_close(packed_logps[index], logps, rtol=1e-4, atol=2e-4)


def require_plain_samples(folder: Path) -> None:
    """The sampler's log-probs are those of plain passes over what it drew."""
    model = load_model(folder)
    disable_dropout(model)
    prompts = [(5, 6, 7), (8, 9, 10, 11, 12, 13, 14), (15,)]
    config = SamplingConfig(max_new_tokens=30, precision="fp32")
    from dpo_core.data.tokens.sequences import TokenSequence

    for prompt, drawn in zip(prompts, sample(model, prompts, config, eos_id=3, seed=1), strict=True):
        with torch.no_grad():
            wanted = full_logps(model, TokenSequence(prompt, drawn.ids))
        torch.testing.assert_close(torch.tensor(drawn.logps), wanted, rtol=1e-4, atol=2e-4)


def go_through(model: Path, work: Path) -> None:
    """SFT, cache, DPO, reward model, PPO, GRPO, evaluation, LoRA, export and reload."""
    rows = pair_rows(8)
    reference = run(sft_job(work / "sft", model))
    first = curve(work / "sft")[0]
    assert math.isfinite(first["loss"])
    require_plain_logps(reference)
    require_plain_samples(reference)

    shard = write_reference(reference, rows, work / "shard")
    dpo = {"batch_size": 8, "epochs": 2, "optim": OPTIM, "engine": ENGINE}
    policy = run(write_job(work / "dpo", "dpo", reference, rows, settings=dpo, reference_logps=str(shard)))
    steps = curve(work / "dpo")
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4), "the policy starts as its reference"
    assert steps[1]["loss"] != steps[0]["loss"]
    require_plain_logps(policy)
    assert any(
        not ours.equal(theirs)
        for ours, theirs in zip(
            load_model(policy).parameters(), load_model(reference).parameters(), strict=True
        )
    )

    lora = dpo | {"lora": {"rank": 2, "alpha": 4.0}}
    try:
        merged = run(
            write_job(work / "lora", "dpo", reference, rows, settings=lora, reference_logps=str(shard))
        )
    except AssertionError:
        left = (work / "lora" / "error.json").read_text()
        assert "LoRA" in left, left  # refused in words, before a step
        assert not curve(work / "lora")
    else:
        require_plain_logps(merged)

    reward = {"batch_size": 8, "max_steps": 1, "optim": OPTIM, "engine": ENGINE, "micro_batch_size": 8}
    judge = run(write_job(work / "reward", "reward", reference, rows, settings=reward))
    require_reward_reloads(judge, reference, rows)

    rounds: dict[str, Any] = {"iterations": 1, "episodes": 8, "micro_batch_size": 4, "engine": ENGINE}
    ppo = online_job(work / "ppo", reference, "ppo", dict(rounds), reward_source=str(judge))
    require_plain_logps(run(ppo))
    grpo = online_job(work / "grpo", reference, "grpo", rounds | {"group_size": 4})
    require_plain_logps(run(grpo))
    for name in ("ppo", "grpo"):
        line = curve(work / name)[0]
        assert line["objective/kl"] == pytest.approx(0, abs=1e-5)
        assert line["sampling/logp_difference/max"] < 1e-3, "the sampler draws from what is trained"


def require_reward_reloads(folder: Path, reference: Path, rows: list[dict[str, Any]]) -> None:
    """Two loads of a reward model give the same scores, and not all the same."""
    from dpo_core.models.reward_model import RewardModel
    from dpo_core.rewards.model import score

    sequences = [side for pair in token_pairs(reference, rows) for side in (pair.chosen, pair.rejected)]
    first, second = (score(RewardModel.load(folder), sequences, "fp32") for _ in range(2))
    assert first == second
    assert len(set(first)) > 1
    # Normalised on these very answers when it was trained: a trunk that came back as noise would not be.
    assert torch.tensor(first).mean().item() == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize(
    "model_type", [pytest.param(t, marks=() if t in QUICK else pytest.mark.slow) for t in REPRESENTATIVE]
)
def test_an_architecture_goes_through_every_part(
    alone: None, checkpoint: Callable[[str], Path], tmp_path: Path, model_type: str
) -> None:
    folder = checkpoint(model_type)
    check = check_folder(folder, precision="fp32", longest=64)
    assert check.layout != "refused", check.reason
    go_through(folder, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in model_types() if t not in REPRESENTATIVE])
def test_every_architecture_is_right_or_refused(
    alone: None, checkpoint: Callable[[str], Path], tmp_path: Path, model_type: str
) -> None:
    try:
        folder = checkpoint(model_type)
    except Exception as error:
        pytest.skip(f"no small config builds it: {error}")
    check = check_folder(folder, precision="fp32", longest=64)
    if check.layout == "refused":
        assert REFUSED.get(model_type, "never") in check.reason, check.reason
        return
    assert model_type not in REFUSED
    go_through(folder, tmp_path)
