"""Writes models trained in fp32 with the data types and generation config of their original checkpoint."""

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
        like: the checkpoint folder that the model was read from, whose data types and generation config are
            kept. None or a .gguf file: the weights are written as they are.
    """
    stored = _stored_dtypes(like) if like is not None and like.is_dir() else {}
    common = _most_frequent(stored)
    settings, original = model.generation_config, like and (like / _GENERATION)
    with quiet_transformers():
        if original and original.is_file():
            # transformers refuses to save hand-written ones that contradict themselves.
            model.generation_config = type(settings)()
        state = _cast(model.state_dict(), stored, common) if common else None
        model.save_pretrained(out, state_dict=state)
        model.generation_config = settings
        getattr(tokenizer, "original", tokenizer).save_pretrained(out)
    if original and original.is_file():
        shutil.copyfile(original, out / _GENERATION)
    if like is not None and common:
        _name_dtype(out / "config.json", like / "config.json", str(common).removeprefix("torch."))


def export_policy(model: Any, tokenizer: "PreTrainedTokenizerBase", start: Path, out: Path) -> None:
    """Write a trained model with the data types and the exact config (dropout too) of its start."""
    save_checkpoint(model, tokenizer, out, like=start)
    shutil.copyfile(start / "config.json", out / "config.json")


def most_frequent_dtype(folder: Path) -> "torch.dtype | None":
    """The data type of most weights of a folder; None if all are fp32."""
    return _most_frequent(_stored_dtypes(folder))


def _stored_dtypes(folder: Path) -> dict[str, tuple["torch.dtype", int]]:
    """Data type and number of elements of every floating-point tensor, by its name in the files."""
    import torch  # noqa: PLC0415 - read without torch too

    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return {
        name: (dtypes[dtype], elements) for name, dtype, elements in tensor_headers(folder) if dtype in dtypes
    }


def _most_frequent(stored: dict[str, tuple["torch.dtype", int]]) -> "torch.dtype | None":
    """The data type of most weights; None if all are fp32 and nothing has to be cast."""
    import torch  # noqa: PLC0415 - read without torch too

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
        storage = tensor.data_ptr(), tensor.shape
        if storage not in cast:
            dtype = stored[name][0] if name in stored else common
            narrow = tensor.to(dtype) if tensor.is_floating_point() else tensor
            # The largest fp16 is 65,504, and training may have exceeded it.
            cast[storage] = narrow if narrow.isfinite().all() else tensor
        result[name] = cast[storage]
    return result


def _name_dtype(config: Path, source: Path, common: str) -> None:
    """Set the written config's data type to that of its source, or else to that of most weights."""
    original, facts = json.loads(source.read_bytes()), json.loads(config.read_bytes())
    facts["dtype"] = original.get("dtype") or original.get("torch_dtype") or common
    config.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
