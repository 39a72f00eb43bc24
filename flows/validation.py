"""`dpo validate`: the data gate alone, on a file, without a run."""

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_core.config import Config
from dpo_core.data.config import DataConfig
from dpo_core.data.records import load
from dpo_core.data.split import by_source, split_table
from dpo_core.errors import RecipeError
from expectations.config import GateConfig
from expectations.drift import load_baseline
from expectations.gate import judge
from expectations.report import GateReport
from tasks.recipe import overridden


class _Asked(Config):
    """The two slices of a recipe that the gate reads."""

    data: DataConfig
    """The data."""
    gate: GateConfig
    """The gate."""


def judge_file(data: str, overrides: Sequence[str]) -> tuple[GateReport, str]:
    """The gate's report on a data set, and the lines that say how it was read.

    Args:
        overrides: `data.x=value` and `gate.x.y=value`, as in a recipe.

    Raises:
        DataError: the data cannot be read.
        RecipeError: an override cannot be used.
    """
    given: dict[str, Any] = {"data": {"path": data}, "gate": {}}
    asked = overridden(_Asked, given, overrides, f"{data} cannot be judged", "Mend the override")
    config, gate = asked.data, asked.gate
    loaded = load(config)
    frame = split_table(loaded, config)
    baseline = load_baseline(gate.baseline) if gate.baseline else None
    # One folder a data set, so that asking again replaces the last answer.
    name = hashlib.sha256(os.path.abspath(data).encode()).hexdigest()[:12]
    docs = _own_folder(Path(tempfile.gettempdir()) / f"dpo-gate-{os.getuid()}") / name
    shutil.rmtree(docs, ignore_errors=True)
    report, _ = judge(
        frame,
        subject=loaded.kind,
        config=gate,
        docs_dir=docs,
        baseline=baseline,
    )
    said = [f"{loaded.format} ({loaded.recognised_by}); {_counted(loaded.notes)}", *loaded.remarks]
    if config.eval_path is not None:
        said.append(f"held out: {int((frame['split'] == 'eval').sum())} rows of {config.eval_path}")
    for name, count in by_source(frame).items():
        said.append(f"{name}: {count['train']} rows to train on, {count['eval']} held out")
    return report.model_copy(update={"remarks": said}), "\n  ".join(said)


def _own_folder(folder: Path) -> Path:
    """The folder, made for this user alone: everybody may write beside it, and knows its name.

    Raises:
        RecipeError: somebody else has put a link or a folder there.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
        raise RecipeError(f"{folder} is not this user's own folder", "Set TMPDIR to a folder of yours")
    folder.chmod(0o700)
    return folder


def _counted(notes: dict[str, int]) -> str:
    """`24 rows read, 1 ties dropped`: the counts that are not zero."""
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in notes.items() if count)
