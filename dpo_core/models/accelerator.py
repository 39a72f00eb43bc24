"""Which kind of device DeepSpeed runs on."""

import os

import torch


def name_accelerator() -> None:
    """Tell DeepSpeed what to run on; else it finds out and says so on stdout."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
