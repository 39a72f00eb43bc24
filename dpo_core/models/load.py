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
from dpo_core.models.folder import LOAD_REMEDY, require_safetensors
from dpo_core.models.from_scratch import make_from_scratch, new_tokenizer, scratch_shape
from dpo_core.models.kind import check_kind, check_sees_the_past_only
from dpo_core.models.remote_code import trust, trusts
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
        check_sees_the_past_only(model, source)
        save_checkpoint(model, tokenizer, out, like=None if config.scratch else source)
        if code:
            trust(out)


def read_config(config: ModelConfig) -> Any:
    """The transformers config of the model that `convert` would write, without reading weights.

    Raises:
        ModelError: there is no such model, or `scratch` asks for one that cannot be made.
    """
    source = locate(config)
    found = config_in(source, config.trust_remote_code)
    check_kind(found, source)
    return scratch_shape(found, config.scratch) if config.scratch else found


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
        from transformers import AutoConfig

        folder, name = (source.parent, source.name) if source.is_file() else (source, None)
        code = _may_run(source, trust_remote_code)
        return AutoConfig.from_pretrained(folder, gguf_file=name, trust_remote_code=code)


def _may_run(source: Path, trust_remote_code: bool | None) -> bool:
    return trusts(source) if trust_remote_code is None else trust_remote_code


def load_model(source: Path, *, trust_remote_code: bool | None = None) -> "PreTrainedModel":
    """Load a causal language model in fp32, in eval mode, dropout as the checkpoint says.

    Args:
        trust_remote_code: run Python code that ships with it. Empty: where that code is trusted already
            (`remote_code`), as that of an imported model is.

    Raises:
        ModelError: not a causal language model, weights missing, pickled, damaged or not of the config.
    """
    import torch

    with quiet_transformers():
        from transformers import AutoModelForCausalLM
        from transformers.utils.quantization_config import GgufConfig

    arguments: dict[str, Any] = {"trust_remote_code": _may_run(source, trust_remote_code)}
    if source.suffix == ".gguf":
        # dequantize=True: without it transformers refuses to save the model.
        arguments |= {"gguf_file": source.name, "quantization_config": GgufConfig(dequantize=True)}
        return load_weights(AutoModelForCausalLM, source, torch.float32, in_part=True, **arguments)
    require_safetensors(source)
    try:
        config = _config(source, trust_remote_code)
    except Exception as error:
        raise _cannot_load(source, error, LOAD_REMEDY) from error
    in_part = check_kind(config, source)
    return load_weights(AutoModelForCausalLM, source, torch.float32, in_part=in_part, **arguments)


def load_weights(
    model_class: Any, source: Path, dtype: "torch.dtype", *, in_part: bool = False, **arguments: Any
) -> Any:
    """`from_pretrained` of a folder or .gguf file, in eval mode; its weights and the class's are the same.

    Args:
        in_part: weights that the class has no place for may be left over.

    Raises:
        ModelError: weights missing, left over, pickled, damaged or of another shape.
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
        # transformers would fill these with random values and go on.
        raise ModelError(
            f"{source} lacks {len(missing)} weights of its config, first {missing[0]}", LOAD_REMEDY
        )
    left = sorted(name for name in info["unexpected_keys"] if not _OLD_BUFFERS.search(name))
    if left and not in_part:
        # transformers would leave these out and go on, so that the model is another than its files say.
        raise ModelError(
            f"{source} holds {len(left)} weights that {type(model).__name__} has no place for, "
            f"first {left[0]}",
            "Use a checkpoint of the architecture that its config.json names, without further weights",
        )
    return model.eval()


def _cannot_load(source: Path, error: Exception, remedy: str) -> ModelError:
    return ModelError(f"the model in {source} cannot be loaded: {first_line(error)}", _remedy(error, remedy))


# Masks and tables of positions, which checkpoints of GPT-J, GPT-Neo, CodeGen and others carry along.
_OLD_BUFFERS = re.compile(r"(masked_bias|attn\.bias|attention\.bias|inv_freq|_cached|position_ids)$")


def load_tokenizer(source: Path, trust_remote_code: bool | None = None) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a checkpoint folder or .gguf file; see `load_model` for code.

    Raises:
        ModelError: there is none, it is damaged, or it names no end-of-sequence token.
    """
    with quiet_transformers():
        from transformers import AutoTokenizer

    folder, gguf = (source.parent, {"gguf_file": source.name}) if source.suffix == ".gguf" else (source, {})
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=_may_run(source, trust_remote_code), **gguf
            )
    except Exception as error:
        beside = "Put the model's tokenizer files (tokenizer.json, tokenizer_config.json) beside its weights"
        raise ModelError(
            f"the tokenizer in {source} cannot be loaded: {first_line(error)}",
            _remedy(error, GGUF_REMEDY if gguf else beside),
        ) from error
    # How it was loaded is none of its facts: saved with them, it would make another artifact of the same
    # model where HF_HUB_OFFLINE is set.
    tokenizer.init_kwargs.pop("local_files_only", None)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer in {source} names no end-of-sequence token",
            "Set eos_token in its tokenizer_config.json: answers must be able to end",
        )
    return tokenizer


def check_tokenizer_fits(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer that can produce ids the model has no embedding for, or that is of another model."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens and the model embeds only {rows}",
            "Use the tokenizer that belongs to the model",
        )
    # Templates end a turn by a token that often stands in generation_config.json alone.
    configs = (model.config.get_text_config(), getattr(model, "generation_config", None))
    ends = [getattr(config, "eos_token_id", None) for config in configs]
    known = {i for end in ends for i in (end if isinstance(end, list) else [end]) if i is not None}
    if known and tokenizer.eos_token_id not in known:
        raise ModelError(
            f"the tokenizer ends answers with id {tokenizer.eos_token_id}, the model with {sorted(known)}",
            "Use the tokenizer that belongs to the model",
        )


def check_finite(model: "PreTrainedModel", where: str) -> None:
    """Refuse weights that hold NaN or infinity."""
    import torch

    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(
                f"the weights {name} of {where} hold NaN or infinity", "Use an undamaged checkpoint"
            )


def _remedy(error: Exception, other: str) -> str:
    code = "Set model.trust_remote_code if you have read that code, or use a model that comes without any"
    return code if "custom code" in str(error) else other


def templates_of(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The texts of a tokenizer's chat templates: none, one, or several by name."""
    found = tokenizer.chat_template
    return list(found.values()) if isinstance(found, dict) else [found] if found else []
