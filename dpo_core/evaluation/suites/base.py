"""What a suite is: what it measures, which file it reads and the function that runs it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_core.evaluation.config import SuiteConfig
from dpo_core.evaluation.results import Outcome

if TYPE_CHECKING:
    from dpo_core.evaluation.model_under_test import Subject

Run = Callable[["Subject", list[dict[str, Any]], SuiteConfig], Outcome]
"""Takes the subject, the rows of the file, and the settings. Every rank of the subject calls it."""


@dataclass(frozen=True)
class Suite:
    """One suite."""

    name: str
    title: str
    """Its name in tables."""
    about: str
    """What it asks, in a line."""
    files: tuple[str, ...]
    """Usual names of its data file, looked for in the data folder and one level below it."""
    source: str
    """Where the file comes from, for the message that it is missing."""
    run: Run
    read: Callable[[Path], list[dict[str, Any]]]
    beside: Callable[[Path], list[Path]] = lambda file: []
    """Further files that it reads: parts of the set, questions for shots."""
    check: Callable[[SuiteConfig], None] = lambda config: None
    """Refuses at once what running it would refuse: a package that is missing, a permission."""
    version: int = 1
    """Raised when what it measures changes: results of other versions are not compared."""
