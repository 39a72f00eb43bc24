"""The job file of the data gate, which needs the model's tokenizer and chat template."""

from typing import Any, Literal

from dpo_core.data.tokens.config import TokenConfig
from dpo_core.jobs.files import ModelJob
from expectations.config import GateConfig
from expectations.features import Subject


class GateJob(ModelJob):
    """Judge rows, and write those that may go on."""

    one_rank = True
    kind: Literal["expectations.job"] = "expectations.job"
    subject: Subject
    rows: str
    """Parquet file of the rows."""
    model: str
    """Checkpoint folder, for its tokenizer and chat template."""
    config: GateConfig
    baseline: dict[str, Any] | None = None
    """The profile of an earlier report, for the drift rules."""
    tokens: TokenConfig
    docs: str
    """Folder of the Data Docs."""
    out: str
    """Parquet file to write."""
