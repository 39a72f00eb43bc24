"""Token ids of a prompt with its completions, and the error where tokenising leaves no row."""

from dataclasses import dataclass, field

from dpo_core.errors import NeedsNewSettings


@dataclass(frozen=True)
class TokenSequence:
    """One prompt with one completion, each of at least one id."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    truncated: bool = False
    learnt: tuple[bool, ...] | None = None
    """Which tokens of the completion carry loss, at least one; None: all of them."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)

    @property
    def targets(self) -> int:
        """Number of tokens that carry loss."""
        return len(self.completion) if self.learnt is None else sum(self.learnt)


@dataclass(frozen=True)
class TokenPair:
    """A preference pair as ids; both sides share one prompt."""

    id: str
    chosen: TokenSequence
    rejected: TokenSequence
    agreement: float | None = field(default=None, kw_only=True)
    """Share of votes for the chosen answer; None if unknown."""


def no_rows_left(dropped: dict[str, int]) -> NeedsNewSettings:
    """The error for data of which tokenising left no row.

    Args:
        dropped: number of rows by the reason why they are left out.
    """
    reasons = "; ".join(f"{count} rows: {reason}" for reason, count in dropped.items())
    return NeedsNewSettings(
        f"no training row is left after tokenising ({reasons})", "Raise tokens.max_length"
    )
