"""The precision of a computation depends on what the device is fast at."""

import logging

import pytest
import torch

from dpo_core.scoring import autocast
from dpo_core.scoring.autocast import effective_precision


@pytest.mark.parametrize(
    ("machine", "capability", "used"),
    [
        ("x86_64", "AVX2", "fp32"),
        ("x86_64", "DEFAULT", "fp32"),
        ("x86_64", "AVX512", "bf16"),
        ("aarch64", "DEFAULT", "bf16"),
    ],
)
def test_a_processor_without_bf16_computes_in_fp32_and_says_so(
    machine: str,
    capability: str,
    used: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    autocast._processor_has_bf16.cache_clear()
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with caplog.at_level(logging.WARNING, "dpo"):
        for _ in range(2):
            assert effective_precision("bf16") == used
    monkeypatch.undo()
    autocast._processor_has_bf16.cache_clear()
    assert caplog.text.count("computed in fp32") == (used == "fp32")
    assert [effective_precision("fp32"), effective_precision("bf16", "cuda")] == ["fp32", "bf16"]
