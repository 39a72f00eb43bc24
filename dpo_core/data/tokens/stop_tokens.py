"""Reads the tokens that end a sampled answer from a model's files."""

import json
from pathlib import Path
from typing import Any


def stop_ids(tokenizer: Any) -> set[int]:
    """The tokenizer's end-of-sequence id, and every `eos_token_id` of config.json and generation_config.json
    in the folder that it was loaded from."""
    ids = {int(tokenizer.eos_token_id)}
    folder = Path(tokenizer.name_or_path) if tokenizer.name_or_path else None
    for name in ("config.json", "generation_config.json") if folder else ():
        assert folder is not None
        try:
            facts = json.loads((folder / name).read_bytes())
            eos = facts.get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue  # a .gguf has no such files; damaged files are refused when the model is loaded
        ids |= {int(i) for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int)}
    return ids
