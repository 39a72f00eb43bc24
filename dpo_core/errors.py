"""Errors meant for people: what is wrong, where, and what to do about it.

Each class carries the exit code of the command line: 2 usage or recipe, 3 data gate, 4 a stage failed,
5 promotion refused. The command line prints the message as one line; the traceback goes to the log. What is
secret (`redaction`) is left out of every message.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from dpo_core.redaction import hidden


class DpoError(Exception):
    """Base of every expected failure.

    Args:
        problem: what is wrong and where (file, row, field), without a trailing full stop.
        remedy: what the reader can do about it; an imperative.
    """

    exit_code = 4

    def __init__(self, problem: str, remedy: str = "") -> None:
        problem, remedy = hidden(problem), hidden(remedy)
        # Both go to Exception so that the error survives pickling between processes.
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}. {self.remedy}" if self.remedy else self.problem


class RecipeError(DpoError):
    """The recipe, an override or a command-line argument cannot be used."""

    exit_code = 2


class DataError(DpoError):
    """A data file cannot be read or understood."""

    exit_code = 2


class ModelError(DpoError):
    """A model or tokenizer cannot be used for what the recipe asks."""

    exit_code = 2


class GateRefused(DpoError):
    """The data gate found a critical fault; nothing downstream ran."""

    exit_code = 3


class StageFailed(DpoError):
    """A stage broke while it ran; the run can be resumed."""

    exit_code = 4


class RankLost(StageFailed):
    """This rank is sound but misses another."""


class PromotionRefused(DpoError):
    """The model does not become champion; the champion stays what it was."""

    exit_code = 5


@contextmanager
def without_secrets() -> Iterator[None]:
    """Let an error that nobody expected come out without what is secret in its text: it is shown and stored.

    Raises:
        StageFailed: in its place.
    """
    try:
        yield
    except DpoError:
        raise
    except Exception as error:
        if hidden(str(error)) == str(error):
            raise
        raise StageFailed(f"{type(error).__name__}: {error}", "Resume the run when it is mended") from error
