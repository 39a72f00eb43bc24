"""Definition of a suite: its name, data files and functions."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_core.evaluation.config import SuiteConfig
from dpo_core.evaluation.results import Outcome

if TYPE_CHECKING:
    from dpo_core.evaluation.model_under_test import ModelUnderTest

Run = Callable[["ModelUnderTest", list[dict[str, Any]], SuiteConfig], Outcome]
"""Takes the subject, the rows of the data file and the settings. Every rank of the subject calls it."""


@dataclass(frozen=True)
class Suite:
    """An evaluation suite."""

    name: str
    title: str
    """Name in tables."""
    about: str
    """Its content in one line."""
    files: tuple[str, ...]
    """Usual names of its data file, in the data folder or one level below."""
    source: str
    """Origin of the data file, for the error message if it is missing."""
    run: Run
    read: Callable[[Path], list[dict[str, Any]]]
    extra_files: Callable[[Path], list[Path]] = lambda file: []
    """Further files that it reads: parts of the data set, questions for few-shot examples."""
    check: Callable[[SuiteConfig], None] = lambda config: None
    """Raises early what running it would raise: a missing package or permission."""
    packaged: Path | None = None
    """Its data file, if this package brings it; `files` is not searched then."""
    version: int = 1
    """Raise it when the measures change: results of different versions are not compared."""
