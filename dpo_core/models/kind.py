"""Checks that a checkpoint is a causal language model of text, and refuses other kinds by name."""

import logging
from typing import Any

from dpo_core.data.tokens.image_codes import image_codes
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
    """Refuse a config that is not one of a causal language model of text.

    Returns whether the checkpoint also holds parts for images or sound, which transformers does not load.

    Raises:
        ModelError: an encoder-decoder, or a model of images or sound that has no text-only class.
    """
    kind = config.model_type
    if image_codes(config):
        return False
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{source} is an encoder-decoder ({kind}), and DPO trains decoders", USE)
    parts = " ".join(type(config).sub_configs)
    modality = next((label for part, label in _OTHER_INPUTS.items() if part in parts), None)
    if modality is None:
        return False
    text = config.sub_configs.get("text_config")
    if text is not None and text is _trained_config(config):
        log.warning("%s is %s (%s): only its language model is used", source, modality, kind)
        return True
    inner = getattr(getattr(config, "text_config", None), "model_type", None)
    raise ModelError(
        f"{source} is {modality} ({kind}), which cannot be trained on text alone",
        f"Save its language model ({inner}) as a separate checkpoint, or use another" if inner else USE,
    )


def _trained_config(config: Any) -> Any:
    """The config class of the model that `AutoModelForCausalLM` builds from this config."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - see transformers_lock

    mapping = AutoModelForCausalLM._model_mapping
    return getattr(mapping[type(config)], "config_class", None) if type(config) in mapping else None


def check_causal(model: Any, source: object) -> None:
    """Refuse a model in which a token's logits depend on the tokens that follow it.

    Raises:
        ModelError: it attends in both directions, or does not run on text alone.
    """
    import torch  # noqa: PLC0415 - read without torch too

    name, rows = type(model).__name__, model.get_input_embeddings().weight.shape[0]
    ids_2T = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]]) % rows
    try:
        with torch.no_grad():
            logits_2TV = model(input_ids=ids_2T, use_cache=False).logits.float()
    except Exception as error:
        message = (str(error).splitlines() or [""])[0][:200]
        raise ModelError(
            f"{name} of {source} does not run on text alone ({type(error).__name__}: {message})", USE
        ) from error
    first_row, second_row = logits_2TV[:, :3]
    if float((first_row - second_row).abs().max()) > 1e-2 * float(first_row.std()):
        raise ModelError(
            f"{name} of {source} reads the tokens after a position too (bidirectional attention), "
            "and cannot generate text from left to right",
            USE,
        )
