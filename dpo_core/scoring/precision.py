"""Names of the precisions in which log-probs are computed."""

from typing import Literal

Precision = Literal["fp32", "bf16"]
"""fp32, or bf16 autocast over fp32 weights."""
