"""What is timed: pairs as token ids, and models by size."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dpo_core.data.config import DataConfig
from dpo_core.data.load import load
from dpo_core.data.tokens.config import TokenConfig
from dpo_core.data.tokens.sequences import TokenPair, TokenSequence
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.errors import RecipeError

Workload = Literal["hh", "long-prompt", "long-answer", "4k"]
Size = Literal["tiny", "135m", "360m", "1.7b"]

# Median tokens of prompt, chosen and rejected; lengths are log-normal around them.
_SYNTHETIC: dict[str, tuple[int, int, int]] = {
    "long-prompt": (440, 40, 40),  # 11 : 1
    "long-answer": (80, 200, 200),  # 0.4 : 1
    "4k": (2600, 600, 600),
}
_LIMIT = {"hh": 512, "long-prompt": 1024, "long-answer": 1024, "4k": 4096}

# Llama shapes of SmolLM2: layers, width, inner width, heads, key-value heads.
_SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "tiny": (2, 64, 128, 4, 2),
    "135m": (30, 576, 1536, 9, 3),
    "360m": (32, 960, 2560, 15, 5),
    "1.7b": (24, 2048, 8192, 32, 32),
}
VOCABULARY = 49_152


def make_model(size: Size, out: Path, seed: int = 0) -> None:
    """Write a Llama of a size with random weights; speed does not depend on what they are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, inner, heads, kv_heads = _SHAPES[size]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512 if size == "tiny" else VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(out)


def human_pairs(path: str, tokenizer: Any, count: int, seed: int) -> list[TokenPair]:
    """A seeded sample of a preference file, as a training job sees it.

    Raises:
        RecipeError: the file has fewer usable pairs.
    """
    frame = load(DataConfig(path=path)).frame
    frame = frame[frame["fault"] == ""]
    tokens = TokenConfig(max_length=_LIMIT["hh"], max_prompt_length=256, template="transcript")
    pairs, _ = Tokenise(tokenizer, tokens).pairs(frame.to_dict("records"))
    if len(pairs) < count:
        raise RecipeError(f"{path} has {len(pairs)} usable pairs and {count} were asked for", "Ask for fewer")
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [pairs[i] for i in order[:count]]


def made_pairs(workload: Workload, vocabulary: int, count: int, seed: int) -> list[TokenPair]:
    """Pairs of random ids with the lengths of a workload."""
    generator = np.random.default_rng((seed, len(workload)))
    limit = _LIMIT[workload]

    def ids(length: float) -> tuple[int, ...]:
        return tuple(generator.integers(1, vocabulary, max(1, int(length))).tolist())

    pairs = []
    for number in range(count):
        medians = np.array(_SYNTHETIC[workload])
        prompt, chosen, rejected = medians * generator.lognormal(0, 0.35, 3)
        prompt = min(prompt, limit - 1 - min(max(chosen, rejected), limit // 2))
        room = limit - int(prompt)
        shared = ids(prompt)
        sides = [TokenSequence(shared, ids(min(length, room))) for length in (chosen, rejected)]
        pairs.append(TokenPair(f"{workload}-{number}", *sides))
    return pairs
