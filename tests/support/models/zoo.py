"""Every causal architecture of transformers that a small config builds, with random weights.

One table of sizes serves nearly all: a config gets those that it has a field for. `OVERRIDES` holds what
single architectures need besides.
"""

import contextlib
from typing import Any

MOST_PARAMETERS = 4_000_000
VOCABULARY = 96
WINDOW = 24

_SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "embedding_size", "emb_dim"), 32
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 64),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("sliding_window", "keep_window_size", "attention_window_size"), WINDOW),
    "vocab_size": VOCABULARY,
    "word_embed_proj_dim": 32,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 2,
    "head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "layer_types": None,
}
_LATENT = {"head_dim": 8, "num_key_value_heads": 4}
_CONVOLVED = {"layer_types": ["conv", "full_attention"]}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
# What single architectures need besides; the values of scales are such that they show.
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "axk1", "axk2"), _LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu", "longcat_flash"), _LATENT),
    "bailing_hybrid": {"num_hidden_layers": 8} | _LATENT,
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text"), _HYBRID),
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]} | _LATENT,
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), _CONVOLVED),
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_groups": 1, "mamba_expand": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "helium": {"head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_groups": 1, "mamba_expand": 2, "lm_head_multiplier": 0.5},
    "bamba": {"attn_layer_indices": [1], "mamba_n_groups": 1, "mamba_expand": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2},
    "nemotron_h": {
        "n_groups": 1,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "hybrid_override_pattern": "M*",
    },
    "granite": {"logits_scaling": 8.0},
    "granitemoe": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.5},
    "opt": {"dropout": 0.1, "layerdrop": 0.1},
}


def config_of(model_type: str, **changes: Any) -> Any:
    """A small config. Raises whatever the architecture finds wrong with it."""
    from transformers import AutoConfig

    kind = type(AutoConfig.for_model(model_type))
    known = set(kind().to_dict()) | set(getattr(kind, "attribute_map", None) or {})
    settings = {name: value for name, value in _SIZES.items() if name in known}
    settings |= OVERRIDES.get(model_type, {}) | changes
    with contextlib.suppress(Exception):
        return kind(**settings)
    settings.pop("layer_types", None)
    return kind(**settings)


def build(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """The model in fp32 and eval mode.

    Raises:
        ValueError: it is too large for a test.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of(model_type, **changes)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{model_type} has {size} parameters")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def model_types() -> list[str]:
    """All model types that transformers calls causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
