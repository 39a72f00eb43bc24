"""Names of the precisions in which log-probs are computed."""

from typing import Literal

Precision = Literal["fp32", "bf16"]
"""fp32, or bf16 autocast over fp32 weights. An x86 processor without AVX-512 has no bf16 arithmetic and
computes in fp32, whichever is asked for."""
