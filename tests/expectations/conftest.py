"""The gate, run on a frame in a folder of the test's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from expectations.config import GateConfig
from expectations.gate import judge
from expectations.report import GateReport


@pytest.fixture
def gate(tmp_path: Path) -> Callable[..., tuple[GateReport, pd.DataFrame]]:
    def run(frame: pd.DataFrame, **options: Any) -> tuple[GateReport, pd.DataFrame]:
        settings: dict[str, Any] = {"subject": "pairs", "config": GateConfig(), "docs_dir": tmp_path / "docs"}
        return judge(frame, **(settings | options))

    return run
