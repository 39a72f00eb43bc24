"""The gate, run on a frame in a folder of the test's own."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from expectations.config import GateConfig
from expectations.features import Tokenisation
from expectations.gate import _Expectations, judge
from expectations.report import GateReport

NAMES = [field.name for field in dataclasses.fields(Tokenisation)]


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[GateReport, pd.DataFrame]]:
    # Half the time of a small frame; tests of Data Docs call `judge` themselves.
    monkeypatch.setattr(_Expectations, "write_docs", lambda docs: None)

    def run(frame: pd.DataFrame, **options: Any) -> tuple[GateReport, pd.DataFrame]:
        settings: dict[str, Any] = {"subject": "pairs", "config": GateConfig(), "docs_dir": tmp_path / "docs"}
        known = {name: options.pop(name) for name in NAMES if name in options}
        return judge(frame, **({"tokenisation": Tokenisation(**known)} | settings | options))

    return run
