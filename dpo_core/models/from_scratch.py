"""Builds a model with random weights in a small shape of a named architecture, for quick studies."""

import copy
from typing import TYPE_CHECKING, Any

from dpo_core.data.demo.reviews import review_demonstrations
from dpo_core.errors import ModelError
from dpo_core.models.config import ScratchConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TEXTS = 4000  # reviews that a new tokenizer is trained on
_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim")
_REMEDY = "Name a plain decoder such as Llama, Qwen, Mistral or GPT-2 in model.name, or remove model.scratch"


def scratch_shape(source: Any, scratch: ScratchConfig) -> Any:
    """A transformers config of the source's architecture in the new shape.

    Raises:
        ModelError: the architecture has more sizes than these (experts, several towers, an encoder).
    """
    config = copy.deepcopy(source)
    width = next((name for name in _WIDTHS if hasattr(config, name)), None)
    required = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    unsupported = [
        name for name in ("num_local_experts", "num_experts", "q_lora_rank") if getattr(config, name, None)
    ]
    plain = config.get_text_config() is config and not getattr(config, "is_encoder_decoder", False)
    if not plain or unsupported or width is None or not all(hasattr(config, name) for name in required):
        raise ModelError(
            f"a model of the architecture {config.model_type} cannot be made from scratch: it has sizes that "
            "model.scratch cannot set",
            _REMEDY,
        )
    config.num_hidden_layers, config.hidden_size = scratch.layers, scratch.hidden_size
    config.num_attention_heads = scratch.heads
    config.vocab_size = scratch.vocabulary or config.vocab_size
    setattr(config, width, scratch.feed_forward)
    for name, value in {
        "num_key_value_heads": scratch.heads,
        "head_dim": scratch.hidden_size // scratch.heads,
    }.items():
        if hasattr(config, name):
            setattr(config, name, value)
    for name in ("layer_types", "no_rope_layers"):
        if getattr(config, name, None):
            setattr(config, name, getattr(config, name)[: scratch.layers])
    return config


def new_tokenizer(tokenizer: Any, scratch: ScratchConfig) -> Any:
    """The named model's tokenizer, or with `vocabulary` one of its kind trained on the generated reviews.

    Raises:
        ModelError: this kind of tokenizer cannot be retrained.
    """
    if scratch.vocabulary is None:
        return tokenizer
    if not hasattr(tokenizer, "train_new_from_iterator"):
        raise ModelError(
            f"{type(tokenizer).__name__} cannot be retrained for model.scratch.vocabulary", _REMEDY
        )
    texts = [prompt + answer for prompt, answer in review_demonstrations(_TEXTS, scratch.seed)]
    return tokenizer.train_new_from_iterator(texts, scratch.vocabulary)


def make_from_scratch(
    source: Any, scratch: ScratchConfig, tokenizer: Any, *, trust_remote_code: bool
) -> "PreTrainedModel":
    """A model in fp32 and eval mode with the random weights of its architecture, fixed by `scratch.seed`.

    Args:
        source: the named model's config.
        tokenizer: of the new model; see `new_tokenizer`.

    Raises:
        ModelError: the architecture cannot be built in this shape.
    """
    import torch  # noqa: PLC0415 - read without torch too
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - see transformers_lock

    config = scratch_shape(source, scratch)
    if scratch.vocabulary is not None:
        config.vocab_size = len(tokenizer)  # training on little text may yield fewer tokens
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
    try:
        with torch.random.fork_rng():
            torch.manual_seed(scratch.seed)
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        raise ModelError(
            f"a model of the architecture {config.model_type} cannot be made in the shape of model.scratch: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}",
            _REMEDY,
        ) from error
    return model.eval()
