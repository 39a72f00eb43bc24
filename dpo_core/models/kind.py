"""What kind of model a checkpoint holds; anything but a causal language model of text is refused by name."""

import logging
from typing import Any

from dpo_core.errors import ModelError

USE = "Use a decoder-only language model, such as one of Llama, Qwen, Gemma, Mistral or SmolLM"
_OTHER_INPUTS = {
    "vision": "a vision-language model",
    "vq": "a vision-language model",
    "image": "a vision-language model",
    "audio": "an audio-language model",
    "text_config": "a multimodal model",
}

log = logging.getLogger("dpo")


def check_kind(config: Any, source: object) -> bool:
    """Refuse, by the config alone, what is no causal language model of text.

    Returns whether the checkpoint holds such a model beside parts for images or sound, which transformers
    leaves out.

    Raises:
        ModelError: an encoder-decoder, or a model of images or sound that has no text-only class.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{source} is an encoder-decoder ({kind}), and DPO trains decoders", USE)
    parts = " ".join(type(config).sub_configs)
    named = next((words for part, words in _OTHER_INPUTS.items() if part in parts), None)
    if named is None:
        return False
    text = config.sub_configs.get("text_config")
    if text is not None and text is _trained_config(config):
        log.warning("%s is %s (%s): only its language model is used", source, named, kind)
        return True
    inner = getattr(getattr(config, "text_config", None), "model_type", None)
    raise ModelError(
        f"{source} is {named} ({kind}), which cannot be trained on text alone",
        f"Write its language model as a checkpoint of its own ({inner}), or use another" if inner else USE,
    )


def _trained_config(config: Any) -> Any:
    """The config class of what `AutoModelForCausalLM` makes of this one."""
    from transformers import AutoModelForCausalLM

    mapping = AutoModelForCausalLM._model_mapping
    return getattr(mapping[type(config)], "config_class", None) if type(config) in mapping else None


def check_sees_the_past_only(model: Any, source: object) -> None:
    """Refuse a model in which a token's logits depend on the tokens that follow it.

    Raises:
        ModelError: it attends in both directions, or does not run on text alone.
    """
    import torch

    name, rows = type(model).__name__, model.get_input_embeddings().weight.shape[0]
    ids_2T = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]]) % rows
    try:
        with torch.no_grad():
            logits_2TV = model(input_ids=ids_2T, use_cache=False).logits.float()
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise ModelError(
            f"{name} of {source} does not run on text alone ({type(error).__name__}: {first})", USE
        ) from error
    one, other = logits_2TV[:, :3]
    if float((one - other).abs().max()) > 1e-2 * float(one.std()):
        raise ModelError(
            f"{name} of {source} reads the tokens after a position too (bidirectional attention), "
            "and cannot write text from left to right",
            USE,
        )
