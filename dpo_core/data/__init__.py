"""Preference data: reading files of any usual format into one canonical table, and splitting it by prompt."""

from dpo_core.data.config import DataConfig, Format
from dpo_core.data.demonstrations import review_demonstrations
from dpo_core.data.fields import Kind, Pair, Prompt, Unpaired
from dpo_core.data.formats import recognise
from dpo_core.data.messages import chat_prompt
from dpo_core.data.openings import review_openings
from dpo_core.data.records import (
    PAIR_COLUMNS,
    PROMPT_COLUMNS,
    UNPAIRED_COLUMNS,
    Loaded,
    load,
    load_eval,
    record_id,
    to_frame,
)
from dpo_core.data.split import prompt_key, split_by_prompt, with_eval_frame

__all__ = [
    "PAIR_COLUMNS",
    "PROMPT_COLUMNS",
    "UNPAIRED_COLUMNS",
    "DataConfig",
    "Format",
    "Kind",
    "Loaded",
    "Pair",
    "Prompt",
    "Unpaired",
    "chat_prompt",
    "load",
    "load_eval",
    "prompt_key",
    "recognise",
    "record_id",
    "review_demonstrations",
    "review_openings",
    "split_by_prompt",
    "to_frame",
    "with_eval_frame",
]
