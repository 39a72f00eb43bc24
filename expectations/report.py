"""The data gate's report: one finding per rule, and the error for refused data."""

from pydantic import Field

from dpo_core.config import Config
from dpo_core.errors import GateRefused
from expectations.drift import Profile
from expectations.rules import Subject
from expectations.thresholds import Severity

_NAMES = {"unpaired": "unpaired rows"}


class Finding(Config):
    """The result of one rule."""

    rule: str
    """Subject and name, as `pairs/contradiction`; the name is the field of `GateConfig`."""
    severity: Severity
    """critical or warning."""
    passed: bool
    """Whether the rule holds within its threshold (True when it was skipped)."""
    skipped: bool = False
    """Whether the rule could not be checked; the message gives the reason."""
    count: int = 0
    """Number of offending rows; 0 for rules on the whole set."""
    rate: float = 0.0
    """Share of offending rows among the checked rows."""
    observed: float | None = None
    """The measured value, for rules on the whole set."""
    threshold: dict[str, float] = Field(default_factory=dict)
    """The thresholds, by their names in the recipe."""
    rows: list[int] = Field(default_factory=list)
    """Source row numbers of the first ten offending rows."""
    message: str
    """One sentence with the result and, if the rule failed, the remedy."""
    remedy: str = ""
    """What to do if the rule failed."""


class GateReport(Config):
    """The gate's findings. If rows were dropped, `findings` are about the remaining rows, `before` about
    all."""

    subject: Subject
    """prompts, pairs or unpaired."""
    rows: int
    """Number of rows before the quarantine."""
    dropped: int = 0
    """Number of rows dropped by the quarantine."""
    dropped_by: dict[str, int] = Field(default_factory=dict)
    """Number of dropped rows by rule; a row that breaks several rules counts for each."""
    refused: bool
    """Whether a critical rule failed."""
    findings: list[Finding]
    """The result of each rule."""
    before: list[Finding] = Field(default_factory=list)
    """If rows were dropped: the findings before that."""
    docs_index: str
    """Path of the Data Docs' index.html."""
    remarks: list[str] = Field(default_factory=list)
    """The reader's remarks about the data (`dpo validate`)."""
    profile: Profile
    """Scripts and languages of the remaining rows: the baseline for a later run."""

    def raise_if_refused(self) -> None:
        """Raise GateRefused with each failed critical rule, its count, rate, first rows and remedy."""
        failed = [f for f in self.findings if f.severity == "critical" and not f.passed]
        if not self.refused:
            return
        what = "; ".join(f"{f.rule}: {f.message.removesuffix(to_do(f.remedy))}" for f in failed)
        remedies = "; ".join(dict.fromkeys(f.remedy for f in failed if f.remedy))
        raise GateRefused(
            f"the data gate refused the {_NAMES.get(self.subject, self.subject)}: {what}",
            f"{remedies[:1].upper()}{remedies[1:]}. The full report: {self.docs_index}",
        )


def to_do(remedy: str) -> str:
    """The remedy as the end of a message."""
    return f": {remedy}" if remedy else ""
