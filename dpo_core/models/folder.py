"""Checks a checkpoint folder before anything is loaded: complete, safetensors only, no code from the hub."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_core.data.tokens.image_codes import image_codes
from dpo_core.errors import ModelError
from dpo_core.system import digest_listed

LOAD_REMEDY = "Use a complete checkpoint of a causal language model that transformers knows"
DIFFUSION_INDEX = "model_index.json"
"""The file of a folder of diffusers that names the parts of its model."""
DIFFUSION_PARTS = ("unet", "transformer", "text_encoder", "vae")
"""Its subfolders that hold weights to be loaded."""
IMAGES_EXTRA = "pip install 'dpo-pipeline[images]' (in a checkout: .venv/bin/pip install -e '.[images]')"
"""How to install what diffusion models need."""
JANUS = "janus"
"""The type of model of Janus and Janus-Pro in transformers."""
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_INDEX = "model.safetensors.index.json"
# Implementations of attention that come with transformers; others are code that is fetched from the hub.
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


def check_folder(folder: Path, trust_remote_code: bool = False) -> None:
    """Refuse a folder that is not a full checkpoint, or that loads more than its own weights.

    Raises:
        ModelError: no config, no safetensors, an adapter, weights outside the folder, or code from the hub.
    """
    if is_denoiser(folder):
        for part in DIFFUSION_PARTS:
            if (folder / part).is_dir():
                require_safetensors(folder / part)
        return
    facts = _read(folder / "config.json", folder)
    if (folder / "adapter_config.json").exists():
        # transformers would load the base model that it names, wherever that is.
        raise ModelError(
            f"{folder} holds an adapter (adapter_config.json), not a full model",
            "Merge it into its base model, and name the folder of the merged model",
        )
    require_safetensors(folder)
    if not trust_remote_code:
        _refuse_fetched_code(facts, folder)


def _read(path: Path, folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(
            f"{folder} holds no {path.name}", "Name the folder of a Hugging Face checkpoint"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({error})", LOAD_REMEDY) from error
    if not isinstance(facts, dict):
        raise ModelError(f"{path} is not a JSON object", LOAD_REMEDY)
    return facts


def is_denoiser(folder: Path) -> bool:
    """Whether a folder is one of diffusers, a model that makes images by denoising."""
    return (folder / DIFFUSION_INDEX).is_file()


def makes_images(source: Path) -> bool:
    """Whether the completions of a located model are images."""
    if not source.is_dir():
        return False
    if is_denoiser(source):
        return True
    return is_janus(source) or image_codes(_read(source / "config.json", source)) is not None


def is_janus(source: Path) -> bool:
    """Whether a folder holds Janus, whose config names its codes in other words."""
    file = source / "config.json"
    return file.is_file() and _read(file, source).get("model_type") == JANUS


def _refuse_fetched_code(facts: dict[str, Any], folder: Path) -> None:
    for name in _ATTENTION:
        setting = facts.get(name)
        implementations = setting.values() if isinstance(setting, dict) else [setting]
        if any(isinstance(value, str) and "/" in value for value in implementations):
            raise ModelError(
                f"{folder / 'config.json'} loads code from the hub: {name} is {setting}",
                f"Remove {name}, or set model.trust_remote_code if you have read and trust that code",
            )


def require_safetensors(folder: Path) -> None:
    """Refuse a folder without safetensors, or whose index names other files.

    Raises:
        ModelError: only pickled weights, no weights, or an index that names a file outside the folder.
    """
    index = folder / _INDEX
    if index.exists():
        parts = _read(index, folder).get("weight_map")
        for part in sorted(set(map(str, parts.values()))) if isinstance(parts, dict) else ["nothing"]:
            if Path(part).name != part or not part.endswith(".safetensors"):
                raise ModelError(
                    f"{index} names {part}, which is not a safetensors file in its folder", LOAD_REMEDY
                )
    if any(folder.glob("*.safetensors")):
        return
    pickled = [file for pattern in PICKLED for file in sorted(folder.glob(pattern))]
    if pickled:
        raise ModelError(
            f"{folder} holds only pickled weights ({pickled[0].name}), which can run code when they are read",
            "Convert them to safetensors first",
        )
    raise ModelError(f"{folder} holds no safetensors weights", LOAD_REMEDY)


def tensor_headers(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Name, data type (as safetensors names it) and number of elements of every stored tensor."""
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                yield name, tensor["dtype"], math.prod(tensor["shape"])


def code_digest(folder: Path) -> str | None:
    """sha256 of the Python files that ship with a model; None if there are none."""
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else []
    return digest_listed({str(file.relative_to(folder)): file for file in files}) if files else None
