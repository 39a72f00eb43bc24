"""User errors: exceptions whose message says what is wrong, where, and what to do about it.

Each class has an exit code for the command line: 2 usage or recipe, 3 data gate, 4 a stage failed, 5
promotion refused. The command line prints the message as one line; the traceback goes to the log. Secrets are
removed from every message (`redaction`).
"""

from collections.abc import Iterator
from contextlib import contextmanager

from dpo_core.redaction import redact


class DpoError(Exception):
    """Base of every expected failure.

    Args:
        problem: what is wrong and where (file, row, field), without a trailing full stop.
        remedy: what the user can do about it, as an imperative.
    """

    exit_code = 4

    def __init__(self, problem: str, remedy: str = "") -> None:
        problem, remedy = redact(problem), redact(remedy)
        # Pass both to Exception, so that the error survives pickling between processes.
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
    """A model or tokenizer cannot be used as the recipe requires."""

    exit_code = 2


class GateRefused(DpoError):
    """A critical rule of the data gate failed; no later stage ran."""

    exit_code = 3


class StageFailed(DpoError):
    """A stage failed; the run can be resumed."""

    exit_code = 4


class NeedsNewSettings(StageFailed):
    """A stage failed and would fail again with these settings; a new run reuses what is finished."""

    HOW = ", and start the run again without --resume: finished stages are not run again"

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy.removesuffix(self.HOW) + self.HOW)


class RankLost(StageFailed):
    """Another rank of the job is lost; this one is intact."""


class PromotionRefused(DpoError):
    """The model was not promoted; the champion is unchanged."""

    exit_code = 5


@contextmanager
def without_secrets() -> Iterator[None]:
    """Replace an unexpected error whose text contains a secret, because errors are shown and stored.

    Raises:
        StageFailed: in place of such an error, with the secret removed.
    """
    try:
        yield
    except DpoError:
        raise
    except Exception as error:
        if redact(str(error)) == str(error):
            raise
        raise StageFailed(f"{type(error).__name__}: {error}", "Fix the cause, then resume the run") from error
