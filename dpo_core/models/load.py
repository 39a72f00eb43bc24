"""Converts, loads and checks models and tokenizers as Hugging Face checkpoints.

A checkpoint is a folder with `config.json`, safetensors weights and tokenizer files. A GGUF file, an
installed package that carries one, and a hub name are turned into such a folder once.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_core.data.tokens.chat_template import check_template
from dpo_core.errors import ModelError
from dpo_core.models.config import ModelConfig
from dpo_core.models.folder import JANUS, LOAD_REMEDY, is_janus, require_safetensors
from dpo_core.models.from_scratch import make_from_scratch, new_tokenizer, scratch_shape
from dpo_core.models.kind import check_causal, check_kind
from dpo_core.models.remote_code import is_trusted, trust
from dpo_core.models.save import save_checkpoint
from dpo_core.models.source import GGUF_REMEDY, first_line, locate, read_template
from dpo_core.models.transformers_lock import quiet_transformers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def convert(config: ModelConfig, out: Path) -> None:
    """Write the model as a checkpoint folder: safetensors, config, tokenizer, chat template.

    Its weights keep their data types; those of a .gguf file and of new ones are fp32.

    Raises:
        ModelError: weights missing, pickled, damaged or not finite; tokenizer missing or of another model.
    """
    source = locate(config)
    with quiet_transformers():
        tokenizer = load_tokenizer(source, config.trust_remote_code)
        if config.chat_template:
            tokenizer.chat_template = read_template(config.chat_template)
        for template in templates_of(tokenizer):
            check_template(template)
        code = config.trust_remote_code
        if config.scratch:
            tokenizer = new_tokenizer(tokenizer, config.scratch)
            model = make_from_scratch(
                config_in(source, code), config.scratch, tokenizer, trust_remote_code=code
            )
        else:
            model = load_model(source, trust_remote_code=code)
        check_tokenizer_fits(model, tokenizer)
        check_finite(model, str(source))
        check_causal(model, source)
        save_checkpoint(model, tokenizer, out, like=None if config.scratch else source)
        if code:
            trust(out)


def read_config(config: ModelConfig) -> Any:
    """The transformers config of the model that `convert` would write, without reading weights.

    Raises:
        ModelError: there is no such model, or `scratch` asks for one that cannot be made.
    """
    source = locate(config)
    model_config = config_in(source, config.trust_remote_code)
    check_kind(model_config, source)
    return scratch_shape(model_config, config.scratch) if config.scratch else model_config


def config_in(source: Path, trust_remote_code: bool | None = None) -> Any:
    """The transformers config in a checkpoint folder or .gguf file; see `load_model` for code.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        return _config(source, trust_remote_code)
    except Exception as error:
        remedy = GGUF_REMEDY if source.is_file() else LOAD_REMEDY
        raise ModelError(
            f"the config in {source} cannot be read: {first_line(error)}", _remedy(error, remedy)
        ) from error


def _config(source: Path, trust_remote_code: bool | None) -> Any:
    with quiet_transformers():
        from transformers import AutoConfig  # noqa: PLC0415 - see transformers_lock

        folder, name = (source.parent, source.name) if source.is_file() else (source, None)
        code = _may_run(source, trust_remote_code)
        config = AutoConfig.from_pretrained(folder, gguf_file=name, trust_remote_code=code)
    if config.model_type == JANUS:
        from dpo_core.models import visual_lm  # noqa: PLC0415 - only for this model

        visual_lm.register()
        config.image_codes = visual_lm.codes_of(config, folder)
    return config


def _may_run(source: Path, trust_remote_code: bool | None) -> bool:
    return is_trusted(source) if trust_remote_code is None else trust_remote_code


def load_model(source: Path, *, trust_remote_code: bool | None = None) -> "PreTrainedModel":
    """Load a causal language model in fp32, in eval mode, dropout as the checkpoint says.

    Args:
        trust_remote_code: run Python code that ships with it. None: only if that code is already trusted
            (`remote_code`), as that of an imported model is.

    Raises:
        ModelError: not a causal language model, weights missing, pickled, damaged or not of the config.
    """
    import torch  # noqa: PLC0415 - read without torch too

    with quiet_transformers():
        from transformers import AutoModelForCausalLM  # noqa: PLC0415 - see transformers_lock
        from transformers.utils.quantization_config import GgufConfig  # noqa: PLC0415 - see transformers_lock

    arguments: dict[str, Any] = {"trust_remote_code": _may_run(source, trust_remote_code)}
    if source.suffix == ".gguf":
        # dequantize=True: without it transformers refuses to save the model.
        arguments |= {"gguf_file": source.name, "quantization_config": GgufConfig(dequantize=True)}
        return load_weights(AutoModelForCausalLM, source, torch.float32, allow_unexpected=True, **arguments)
    require_safetensors(source)
    try:
        config = _config(source, trust_remote_code)
    except Exception as error:
        raise _cannot_load(source, error, LOAD_REMEDY) from error
    # With the config at hand transformers does not read it twice more.
    arguments |= {"config": config, "allow_unexpected": check_kind(config, source)}
    if config.model_type == JANUS:  # its folder's config.json need not name the codes
        arguments["config"] = config
    model = load_weights(AutoModelForCausalLM, source, torch.float32, **arguments)
    if used := used_parameters(model):
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in used)
    return model


def used_parameters(model: Any) -> set[Any] | None:
    """The weights that decide a model's log-probs, if it has others; those are never trained."""
    return model.used_parameters() if hasattr(model, "used_parameters") else None


def load_weights(
    model_class: Any, source: Path, dtype: "torch.dtype", *, allow_unexpected: bool = False, **arguments: Any
) -> Any:
    """`from_pretrained` of a folder or .gguf file, in eval mode; every weight must match one of the class.

    Args:
        allow_unexpected: ignore weights that the class has no place for.

    Raises:
        ModelError: weights missing, unexpected, pickled, damaged or of another shape.
    """
    gguf = "gguf_file" in arguments
    folder = source.parent if gguf else source
    try:
        with quiet_transformers():
            model, info = model_class.from_pretrained(
                str(folder),
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **arguments,
            )
    except Exception as error:
        raise _cannot_load(source, error, GGUF_REMEDY if gguf else LOAD_REMEDY) from error
    missing = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if missing:
        # transformers would fill these with random values without an error.
        raise ModelError(
            f"{source} lacks {len(missing)} weights that its config asks for, first {missing[0]}", LOAD_REMEDY
        )
    unexpected = sorted(name for name in info["unexpected_keys"] if not _OLD_BUFFERS.search(name))
    if unexpected and not allow_unexpected:
        # transformers would ignore these without an error, so that the model is not the one in the files.
        raise ModelError(
            f"{source} holds {len(unexpected)} weights that {type(model).__name__} has no place for, "
            f"first {unexpected[0]}",
            "Use a checkpoint of the architecture that its config.json names, without other weights",
        )
    return model.eval()


def _cannot_load(source: Path, error: Exception, remedy: str) -> ModelError:
    return ModelError(f"the model in {source} cannot be loaded: {first_line(error)}", _remedy(error, remedy))


# Masks and position tables that old checkpoints (GPT-J, GPT-Neo, CodeGen and others) contain.
_OLD_BUFFERS = re.compile(r"(masked_bias|attn\.bias|attention\.bias|inv_freq|_cached|position_ids)$")


def load_tokenizer(source: Path, trust_remote_code: bool | None = None) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a checkpoint folder or .gguf file; see `load_model` for code.

    Raises:
        ModelError: it is missing or damaged, or has no end-of-sequence token.
    """
    with quiet_transformers():
        from transformers import AutoTokenizer  # noqa: PLC0415 - see transformers_lock

    folder, gguf = (source.parent, {"gguf_file": source.name}) if source.suffix == ".gguf" else (source, {})
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=_may_run(source, trust_remote_code), **gguf
            )
    except Exception as error:
        remedy = "Put the model's tokenizer files (tokenizer.json, tokenizer_config.json) next to its weights"
        raise ModelError(
            f"the tokenizer in {source} cannot be loaded: {first_line(error)}",
            _remedy(error, GGUF_REMEDY if gguf else remedy),
        ) from error
    if is_janus(source):
        from dpo_core.models import visual_lm  # noqa: PLC0415 - only for this model

        tokenizer = visual_lm.moved(tokenizer, visual_lm.codes_of(_config(source, False), source))
    # Set where HF_HUB_OFFLINE is: saved with the tokenizer, it would make another artifact of the same model.
    tokenizer.init_kwargs.pop("local_files_only", None)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer in {source} has no end-of-sequence token",
            "Set eos_token in its tokenizer_config.json: answers must be able to end",
        )
    return tokenizer


def check_tokenizer_fits(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer that can produce ids the model has no embedding for, or that is of another model."""
    rows = model.get_input_embeddings().weight.shape[0]
    tokenizer = getattr(tokenizer, "original", tokenizer)
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens and the model embeds only {rows}",
            "Use the tokenizer that belongs to the model",
        )
    # The token that ends a turn in a chat template is often only in generation_config.json.
    configs = (model.config.get_text_config(), getattr(model, "generation_config", None))
    ends = [getattr(config, "eos_token_id", None) for config in configs]
    ids = {i for end in ends for i in (end if isinstance(end, list) else [end]) if i is not None}
    if ids and tokenizer.eos_token_id not in ids:
        raise ModelError(
            f"the tokenizer ends answers with id {tokenizer.eos_token_id}, the model with {sorted(ids)}",
            "Use the tokenizer that belongs to the model",
        )


def check_finite(model: "PreTrainedModel", source: str) -> None:
    """Refuse weights that hold NaN or infinity."""
    import torch  # noqa: PLC0415 - read without torch too

    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(
                f"the weights {name} of {source} hold NaN or infinity", "Use an undamaged checkpoint"
            )


def _remedy(error: Exception, default: str) -> str:
    if "custom code" in str(error):
        return "Set model.trust_remote_code if you have read and trust that code, or use a model without code"
    return default


def templates_of(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The texts of a tokenizer's chat templates: none, one, or several by name."""
    templates = tokenizer.chat_template
    return list(templates.values()) if isinstance(templates, dict) else [templates] if templates else []
