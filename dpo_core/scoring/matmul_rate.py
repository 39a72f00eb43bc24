"""Measures how fast this machine multiplies matrices: the upper limit for a training step."""

import time
from typing import Any

import torch


def matmul_rate(dtype: Any, seconds: float = 0.5) -> float:
    """Operations per second of a square matrix product on this machine's GPU or CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    matrix = torch.randn(size, size, device=device).to(dtype)

    def product() -> None:
        (matrix @ matrix)[0, 0].item()  # waits for a GPU

    product()
    start, rounds = time.perf_counter(), 0
    while rounds == 0 or time.perf_counter() - start < seconds:
        product()
        rounds += 1
    return rounds * 2 * size**3 / (time.perf_counter() - start)
