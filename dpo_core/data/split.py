"""Splits rows into training and evaluation by prompt, so that no prompt is on both sides."""

import hashlib
import json
import unicodedata
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from dpo_core.data.config import DataConfig
from dpo_core.data.load import load_eval
from dpo_core.errors import DataError

if TYPE_CHECKING:
    from dpo_core.data.records import Loaded


def prompt_key(prompt: str, chat: bool = False) -> str:
    """The key by which prompts are compared: their words without case, character width and white space.

    For a chat it is the texts of the turns, so that a question has the same key as text and as a single turn.
    """
    text = "\n".join(turn["content"] for turn in json.loads(prompt)) if chat else prompt
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def split_table(loaded: "Loaded", config: DataConfig) -> pd.DataFrame:
    """The table with a column `split`.

    Raises:
        DataError: there are too few prompts to split, or `data.eval_path` cannot be read or has another kind.
    """
    held_out = load_eval(config)
    if held_out is None:
        return split_by_prompt(loaded.frame, config.eval_fraction, config.seed)
    if held_out.kind != loaded.kind:
        raise DataError(
            f"data.path has {loaded.kind}, but data.eval_path has {held_out.kind}",
            "Use data of the same kind for both",
        )
    loaded.remarks.extend(f"{config.eval_path}: {sentence}" for sentence in held_out.remarks)
    frame = held_out.frame
    if config.mixture is not None:
        frame = frame.assign(source=pd.array([config.eval_path] * len(frame), dtype=frame["source"].dtype))
    return with_eval_frame(loaded.frame, frame)[0]


def by_source(frame: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Usable rows for training and evaluation of each set of a mixture; empty for a single set."""
    named = frame[(frame["source"] != "") & (frame["fault"] == "")]
    counts: dict[str, dict[str, int]] = {}
    for source, split in zip(named["source"], named["split"], strict=True):
        counts.setdefault(str(source), {"train": 0, "eval": 0})[str(split)] += 1
    return counts


def split_by_prompt(frame: pd.DataFrame, eval_fraction: float, seed: int) -> pd.DataFrame:
    """The frame with a column `split`: "train" or "eval", the same for all rows of a prompt.

    A hash of the seed and the prompt decides, so that rows added later move no other prompt. (Only if the
    hash leaves one side without any prompt, the nearest prompt is moved there.) Rows with a fault have no
    prompt; they are marked "train" and not counted.

    Args:
        frame: a canonical table with columns prompt, chat, fault.
        eval_fraction: expected share of the distinct prompts in "eval", in (0, 1).
        seed: another seed gives another split.

    Raises:
        DataError: no usable row, or fewer than two distinct prompts.
    """
    keys = _keys(frame)
    sound = (frame["fault"] == "").to_numpy(dtype=bool)
    if len(frame) and not sound.any():
        raise DataError(
            f"none of the {len(frame)} rows can be used; most often: {_most_frequent_fault(frame)}",
            "Correct the rows, or set data.format if their format was not recognised correctly",
        )
    codes, distinct = pd.factorize(keys[sound])
    if len(distinct) < 2:
        others = len(frame) - int(sound.sum())
        why = f" (of the others, {others}, most often: {_most_frequent_fault(frame)})" if others else ""
        raise DataError(
            f"the data has {len(distinct)} distinct prompt(s) in {int(sound.sum())} usable rows{why}, "
            "and training and evaluation must not share one",
            "Add rows with other prompts, or set data.eval_path to separate evaluation data",
        )
    places = np.array([_place(key, seed) for key in distinct])
    held_out = places < eval_fraction
    held_out[places.argmin()] = True
    if held_out.all():
        held_out[places.argmax()] = False
    split = np.full(len(frame), "train", dtype=object)
    split[sound] = np.where(held_out[codes], "eval", "train")
    return frame.assign(split=pd.array(split, dtype="string[pyarrow]"))


def _most_frequent_fault(frame: pd.DataFrame) -> str:
    faults = frame.loc[frame["fault"] != "", "fault"]
    return str(faults.value_counts().index[0])


def with_eval_frame(train: pd.DataFrame, held_out: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Join separate evaluation data as `split` "eval"; also return the prompts that are on both sides.

    Nothing is removed: the data gate decides whether such a leak is acceptable.
    """
    sides = [train.assign(split="train"), held_out.assign(split="eval")]
    joined = pd.concat(sides, ignore_index=True)
    joined["split"] = joined["split"].astype("string[pyarrow]")
    leaked: dict[str, str] = {}
    trained = set(_keys(train)[(train["fault"] == "").to_numpy(dtype=bool)])
    for prompt, key, fault in zip(held_out["prompt"], _keys(held_out), held_out["fault"], strict=True):
        if not fault and key in trained:
            leaked.setdefault(key, prompt)
    return joined, list(leaked.values())


def _keys(frame: pd.DataFrame) -> np.ndarray:
    rows = zip(frame["prompt"], frame["chat"], frame["fault"], strict=True)
    return np.array(["" if fault else prompt_key(prompt, chat) for prompt, chat, fault in rows], dtype=object)


def _place(key: str, seed: int) -> float:
    """A number in [0, 1) that depends only on the prompt and the seed."""
    digest = hashlib.blake2b(f"{seed}\n{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
