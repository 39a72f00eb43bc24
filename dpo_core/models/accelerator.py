"""Sets the type of device that DeepSpeed uses."""

import os

import torch


def set_accelerator() -> None:
    """Set DS_ACCELERATOR: without it DeepSpeed detects the device and prints it to stdout."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
