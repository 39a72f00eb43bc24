"""Which tokens end a sampled answer, as the files of a model say."""

import json
from pathlib import Path
from typing import Any


def stop_ids(tokenizer: Any) -> set[int]:
    """The tokenizer's end of sequence, and every `eos_token_id` of config.json and generation_config.json in
    the folder that it was loaded from."""
    found = {int(tokenizer.eos_token_id)}
    folder = Path(tokenizer.name_or_path) if tokenizer.name_or_path else None
    for name in ("config.json", "generation_config.json") if folder else ():
        assert folder is not None
        try:
            facts = json.loads((folder / name).read_bytes())
            eos = facts.get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue  # a .gguf has none; damaged files are refused where the model is loaded
        found |= {int(i) for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int)}
    return found
