"""Assigns the files of a folder to splits by their names, as in clones of hub data sets."""

import re
from collections.abc import Sequence
from pathlib import Path

from dpo_core.errors import DataError

_TRAIN = ("train", "training")
_TEST = ("test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation", "heldout")
_WORDS = (*_TRAIN, *_TEST)
# Prefer the training split with preferences: train_sft and train_gen contain single answers.
_PREFERENCES = ("_prefs", "_preferences", "_preference", "_pref")
_SHARD = re.compile(r"[-_.](\d+[-_]of[-_]\d+|\d+)(-[0-9a-f]{8,})?$")

_ENDINGS = re.compile(r"(\.(gz|zst|jsonl?|ndjson|csv|parquet|arrow))+$")


def split_of(file: Path, folder: Path) -> str | None:
    """The split in the name of a file or its folders (train, test_prefs); None if there is none."""
    stem = _SHARD.sub("", _ENDINGS.sub("", file.name.lower()))
    for name in (stem, *(part.lower() for part in reversed(file.relative_to(folder).parts[:-1]))):
        words = re.split(r"[-_.]", name)
        if words[0] in _WORDS:  # train, test_prefs
            return name
        if words[-1] in _WORDS:  # helpful-base-train
            return words[-1]
    return None


def choose_split(names: Sequence[str], split: str | None, *, evaluation: bool = False) -> str:
    """The split to read: `split`, or by default the training (or held-out) split.

    Raises:
        DataError: none or several splits match.
    """
    candidates = [split] if split else list(_TEST if evaluation else _TRAIN)
    for word in candidates:
        if word in names:
            return word
        matches = [name for name in names if name.startswith((f"{word}_", f"{word}-", f"{word}."))]
        matches = [name for name in matches if name.endswith(_PREFERENCES)] or matches
        if len(matches) == 1:
            return matches[0]
        if matches:
            names = matches
            break
    which = "data.eval_split" if evaluation else "data.split"
    problem = f"there is no split {split}" if split else "no split is set"
    raise DataError(
        f"{problem}; the files have the splits {', '.join(names)}", f"Set {which} to one of these"
    )


def files_of_split(
    files: Sequence[Path], folder: Path, split: str | None, *, evaluation: bool = False
) -> tuple[list[Path], str]:
    """The files of the split to read, and a sentence about the files left out ("" if there are none).

    Raises:
        DataError: no split or several splits of the folder match.
    """
    labels = {file: split_of(file, folder) for file in files}
    named = list(dict.fromkeys(label for label in labels.values() if label is not None))
    if not named:
        return list(files), ""
    if None in labels.values() and not any(label.startswith(_TRAIN) for label in named):
        labels = {file: label or "train" for file, label in labels.items()}  # rows.jsonl beside test.jsonl
        named.append("train")
    if len(named) == 1 and split is None and None not in labels.values():
        return list(files), ""
    try:
        chosen = choose_split(named, split, evaluation=evaluation)
    except DataError as error:
        raise DataError(f"{folder}: {error.problem}", error.remedy) from error
    selected = [file for file, label in labels.items() if label == chosen]
    skipped = list(dict.fromkeys(label or file.name for file, label in labels.items() if label != chosen))
    which = "data.eval_split" if evaluation else "data.split"
    read = f"the split {chosen} was read ({len(selected)} files)"
    return selected, f"{read}; not read: {', '.join(skipped)} (set {which} to change it)" if skipped else ""
