"""Checkpoints as they are written: what was trained in fp32, in the form of the checkpoint it began as."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_core.models.folder import tensor_headers
from dpo_core.models.transformers_lock import quiet_transformers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_GENERATION = "generation_config.json"


def save_checkpoint(
    model: Any, tokenizer: "PreTrainedTokenizerBase", out: Path, like: Path | None = None
) -> None:
    """Write a normal Hugging Face checkpoint folder (safetensors).

    Args:
        like: the checkpoint folder that the model was read from, whose data types and generation config it
            keeps; without one, or of a .gguf file, the weights are written as they are.
    """
    stored = _stored_dtypes(like) if like is not None and like.is_dir() else {}
    common = _most_frequent(stored)
    settings, kept = model.generation_config, like and (like / _GENERATION)
    with quiet_transformers():
        if kept and kept.is_file():
            # Written by hand, some contradict themselves, and transformers refuses to save them.
            model.generation_config = type(settings)()
        state = _cast(model.state_dict(), stored, common) if common else None
        model.save_pretrained(out, state_dict=state)
        model.generation_config = settings
        tokenizer.save_pretrained(out)
    if kept and kept.is_file():
        shutil.copyfile(kept, out / _GENERATION)
    if like is not None and common:
        _name_dtype(out / "config.json", like / "config.json", str(common).removeprefix("torch."))


def export_policy(model: Any, tokenizer: "PreTrainedTokenizerBase", start: Path, out: Path) -> None:
    """Write a trained model with the data types and the very config (dropout too) of where it started."""
    save_checkpoint(model, tokenizer, out, like=start)
    shutil.copyfile(start / "config.json", out / "config.json")


def _stored_dtypes(folder: Path) -> dict[str, tuple["torch.dtype", int]]:
    """Of every tensor of floating numbers its data type and its size, by its name in the files."""
    import torch

    known = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return {
        name: (known[dtype], elements) for name, dtype, elements in tensor_headers(folder) if dtype in known
    }


def _most_frequent(stored: dict[str, tuple["torch.dtype", int]]) -> "torch.dtype | None":
    """The type of most of the weights; None where there is nothing to change, all of them being fp32."""
    import torch

    sizes: Counter[torch.dtype] = Counter()
    for dtype, elements in stored.values():
        sizes[dtype] += elements
    return sizes.most_common(1)[0][0] if set(sizes) - {torch.float32} else None


def _cast(
    state: dict[str, "torch.Tensor"],
    stored: dict[str, tuple["torch.dtype", int]],
    common: "torch.dtype",
) -> dict[str, "torch.Tensor"]:
    """The state in the stored types, `common` where a name is not known; tied weights stay one tensor."""
    cast: dict[tuple[int, torch.Size], torch.Tensor] = {}
    result = {}
    for name, tensor in state.items():
        place = tensor.data_ptr(), tensor.shape
        if place not in cast:
            dtype = stored[name][0] if name in stored else common
            narrow = tensor.to(dtype) if tensor.is_floating_point() else tensor
            # fp16 ends at 65,504, which training may have passed.
            cast[place] = narrow if narrow.isfinite().all() else tensor
        result[name] = cast[place]
    return result


def _name_dtype(config: Path, source: Path, common: str) -> None:
    """Let a written config name the data type that its source names, or that of most of its weights."""
    given, facts = json.loads(source.read_bytes()), json.loads(config.read_bytes())
    facts["dtype"] = given.get("dtype") or given.get("torch_dtype") or common
    config.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
