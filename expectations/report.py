"""What the gate says: one finding a rule, the report, and the refusal as an error."""

from pydantic import Field

from dpo_core.config import Config
from dpo_core.errors import GateRefused
from expectations.drift import Profile
from expectations.rules import Subject
from expectations.thresholds import Severity

_NAMES = {"unpaired": "unpaired rows"}


class Finding(Config):
    """The verdict on one rule."""

    rule: str
    """Subject and name, as `pairs/contradiction`; the name is the field of `GateConfig`."""
    severity: Severity
    """critical or warning."""
    passed: bool
    """Whether the rule holds within its threshold (True when it was skipped)."""
    skipped: bool = False
    """Whether the rule could not be judged; the message says why."""
    count: int = 0
    """Offending rows among the rows judged; 0 for rules on the whole set."""
    rate: float = 0.0
    """Offending share of the rows judged."""
    observed: float | None = None
    """The number measured, for rules on the whole set."""
    threshold: dict[str, float] = Field(default_factory=dict)
    """The thresholds applied, by their names in the recipe."""
    rows: list[int] = Field(default_factory=list)
    """Source row numbers of the first ten offending rows."""
    message: str
    """One sentence: what was found, and the remedy where the rule failed."""
    remedy: str = ""
    """What to do when it failed."""


class GateReport(Config):
    """What the gate found. With rows dropped, `findings` judge what is left, `before` what came in."""

    subject: Subject
    """prompts, pairs or unpaired."""
    rows: int
    """Rows that came in."""
    dropped: int = 0
    """Rows left out by the quarantine."""
    dropped_by: dict[str, int] = Field(default_factory=dict)
    """Rows dropped by rule; a row hit by several rules counts for each."""
    refused: bool
    """Whether a critical rule failed."""
    findings: list[Finding]
    """The verdict on each rule."""
    before: list[Finding] = Field(default_factory=list)
    """With rows dropped: the findings before they were."""
    docs_index: str
    """Path of the Data Docs' index.html."""
    remarks: list[str] = Field(default_factory=list)
    """How the data were read, where the reader says it (`dpo validate`)."""
    profile: Profile
    """Scripts and languages of the rows that go on: the baseline for a later run."""

    def raise_if_refused(self) -> None:
        """Raises GateRefused naming each failed critical rule, its count, rate, first rows and remedy."""
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
