"""FLOPs against torch's counter, on tiny models and real passes."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from dpo_core.generation.config import SamplingConfig
from dpo_core.generation.generate import sample
from dpo_core.generation.next_token import cache_is_exact
from dpo_core.scoring import flops as cost
from dpo_core.scoring.branch_scores import branch_scores
from dpo_core.scoring.document import Document
from dpo_core.scoring.layout import pack, pad
from dpo_core.scoring.model_shape import shape_of_config

LLAMA = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
UNTIED = LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": False, "head_dim": 24})
GPT2 = GPT2Config(
    vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0
)
CONFIGS = {"llama": LLAMA, "untied": UNTIED, "gpt2": GPT2}
# Equal lengths, so that rows of attention hold no padding.
DOCUMENTS = [Document(tuple(range(1, 33)), (tuple(range(1, 25)), tuple(range(2, 26)))) for _ in range(4)]


def built(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def counted(function: Any) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def sizes(packed: bool) -> tuple[int, int, int]:
    """Tokens, squares and scored positions of `DOCUMENTS`."""
    rows = [len(d) for d in DOCUMENTS] if packed else [32 + 23] * 2 * len(DOCUMENTS)
    return sum(rows), sum(n * n for n in rows), 48 * len(DOCUMENTS)


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_training(name):
    config = CONFIGS[name]
    model, shape = built(config), shape_of_config(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    packed = name != "gpt2"
    layout = (pack if packed else pad)(DOCUMENTS)
    with torch.no_grad():
        measured = counted(lambda: branch_scores(model, layout))
    assert cost.forward(shape, *sizes(packed)) == pytest.approx(measured, rel=0.02)
    measured = counted(lambda: branch_scores(model, layout).logps_SL.sum().backward())
    assert cost.training(shape, *sizes(packed)) == pytest.approx(measured, rel=0.02)


def test_a_shared_prompt_counts_once():
    shape = shape_of_config(LLAMA)
    saved = cost.training(shape, *sizes(packed=True)) / cost.training(shape, *sizes(packed=False))
    tokens = sizes(packed=True)[0] / sizes(packed=False)[0]
    assert tokens < saved < 1.1 * tokens, "of the trunk the share of tokens; the head is the same"


def test_sampling():
    model, shape = built(LLAMA).eval(), shape_of_config(LLAMA)
    prompts = [tuple(range(1, 21))] * 3
    config = SamplingConfig(max_new_tokens=10, precision="fp32")
    assert cache_is_exact(model)  # tried once a model, and no part of what sampling costs
    # No token 128 exists, so that nothing ends early.
    measured = counted(lambda: sample(model, prompts, config, eos_id=128, seed=0))
    assert cost.generation(shape, map(len, prompts), 10) == pytest.approx(measured, rel=0.03)
