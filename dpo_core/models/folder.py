"""What a look at a checkpoint folder tells before anything of it is loaded: whole, plain, without code."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_core.errors import ModelError

LOAD_REMEDY = "Use a complete checkpoint of a causal language model that transformers knows"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_INDEX = "model.safetensors.index.json"
# Implementations of attention that come with transformers; others are code that is fetched from the hub.
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


def check_folder(folder: Path, trust_remote_code: bool = False) -> None:
    """Refuse a folder that is no checkpoint, or that asks for more than its own weights.

    Raises:
        ModelError: no config, no safetensors, an adapter, weights outside of the folder, or code.
    """
    facts = _read(folder / "config.json", folder)
    if (folder / "adapter_config.json").exists():
        # transformers would load the base model that it names, wherever that is.
        raise ModelError(
            f"{folder} holds an adapter (adapter_config.json), not a whole model",
            "Merge it into its base model first, and name the folder of the merged one",
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


def _refuse_fetched_code(facts: dict[str, Any], folder: Path) -> None:
    for name in _ATTENTION:
        asked = facts.get(name)
        named = asked.values() if isinstance(asked, dict) else [asked]
        if any(isinstance(one, str) and "/" in one for one in named):
            raise ModelError(
                f"{folder / 'config.json'} asks for code of the hub: {name} is {asked}",
                f"Take {name} out, or set model.trust_remote_code if you have read that code",
            )


def require_safetensors(folder: Path) -> None:
    """Refuse a folder without safetensors, or whose index leads elsewhere than to safetensors in it.

    Raises:
        ModelError: pickled weights alone, none, or an index that leads out of the folder.
    """
    index = folder / _INDEX
    if index.exists():
        parts = _read(index, folder).get("weight_map")
        for part in sorted(set(map(str, parts.values()))) if isinstance(parts, dict) else ["nothing"]:
            if Path(part).name != part or not part.endswith(".safetensors"):
                raise ModelError(
                    f"{index} names {part}, which is no safetensors file of its folder", LOAD_REMEDY
                )
    if any(folder.glob("*.safetensors")):
        return
    pickled = [file for pattern in _PICKLED for file in sorted(folder.glob(pattern))]
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
    """sha256 of the Python files that ship with a model; None where there are none."""
    digest, files = hashlib.sha256(), sorted(folder.rglob("*.py")) if folder.is_dir() else []
    for file in files:
        digest.update(
            f"{file.relative_to(folder)}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode()
        )
    return digest.hexdigest() if files else None
