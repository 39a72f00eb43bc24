"""Tiny checkpoints of architectures that differ from Llama: experts, other trunks, other inputs."""

from pathlib import Path
from typing import Any

from tests.support.models.tiny import make_tokenizer

WIDTHS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Of each architecture the fields of its config that differ from `WIDTHS`; None leaves one out.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    # As OPT-350m: embeddings narrower than the layers, projected on the way in and out.
    "opt_350m": {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False, "dropout": 0.0},
    "biogpt": {},
    "bert": {"is_decoder": True},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    "mamba": {"state_size": 8},
    "modernbert-decoder": {"bos_token_id": 0},
    "llama4_text": {"intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**EXPERTS, "head_dim": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.0},
    "jamba": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **ROUTED,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
}


def family_config(name: str, **changes: Any) -> Any:
    """The transformers config of a tiny model of this type, with the vocabulary of `make_tokenizer`."""
    from transformers import CONFIG_MAPPING

    tokenizer = make_tokenizer()
    end = tokenizer.eos_token_id
    ids = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
    own = {} if name in {"gpt2", "xglm"} else WIDTHS
    settings = {"vocab_size": len(tokenizer), **ids, **own, **FAMILIES.get(name, {}), **changes}
    return CONFIG_MAPPING[name.removesuffix("_350m")](**settings)


def make_family(folder: Path, name: str, seed: int = 0, spread: float = 4.0, **changes: Any) -> Path:
    """Write a checkpoint folder of a random model of this type.

    Args:
        spread: factor on its weight matrices, which are drawn so small that faults hide in rounding.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = family_config(name, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(spread)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaModel):
    config_class = OwnConfig


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.post_init()
"""


def with_own_code(folder: Path) -> Path:
    """Make the checkpoint folder of a Llama into one of an architecture that comes as code beside it."""
    import json

    (folder / "modeling_own.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
