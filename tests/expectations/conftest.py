"""Clean canonical frames, and the gate run on a frame in a folder of the test's own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from expectations.config import GateConfig
from expectations.gate import judge
from expectations.report import Finding, GateReport

_TOPICS = ["rivers", "bread", "stars", "trains", "music", "gardens", "bridges", "clocks", "maps", "wool"]


def _row_number(index: int) -> int:
    """Source row numbers differ from positions, so that a mix-up of the two fails a test."""
    return 10 * index + 3


def _prompts(rows: int = 40, chat: bool = False) -> pd.DataFrame:
    """Distinct English prompts; every fifth row is in the eval split."""
    texts = [f"What do you know about the {_TOPICS[i % 10]} of town number {i}?" for i in range(rows)]
    if chat:
        turns = [[{"role": "user", "content": t}] for t in texts]
        texts = [json.dumps(t, ensure_ascii=False, separators=(",", ":")) for t in turns]
    return pd.DataFrame(
        {
            "id": [f"id{i}" for i in range(rows)],
            "row": [_row_number(i) for i in range(rows)],
            "prompt": texts,
            "chat": [chat] * rows,
            "fault": [""] * rows,
            "split": ["eval" if i % 5 == 0 else "train" for i in range(rows)],
        }
    )


def _pairs(rows: int = 40, chat: bool = False) -> pd.DataFrame:
    """Distinct pairs; the longer answer is chosen in half of them."""
    long = "There is a lot to say about that, and it is well worth the time: number {}."
    short = "I do not know what to say about that, but it is number {}, is it not?"
    chosen = [(long if i % 2 else short).format(i) for i in range(rows)]
    rejected = [(short if i % 2 else long).format(i) for i in range(rows)]
    return _prompts(rows, chat).assign(
        chosen=chosen, rejected=rejected, chosen_ended=True, rejected_ended=True, agreement=1.0
    )


@pytest.fixture
def gate(tmp_path: Path) -> Callable[..., tuple[GateReport, pd.DataFrame]]:
    def run(frame: pd.DataFrame, **options: Any) -> tuple[GateReport, pd.DataFrame]:
        settings: dict[str, Any] = {"subject": "pairs", "config": GateConfig(), "docs_dir": tmp_path / "docs"}
        return judge(frame, **(settings | options))

    return run


@pytest.fixture(scope="session")
def clean_prompts() -> Callable[..., pd.DataFrame]:
    return _prompts


@pytest.fixture(scope="session")
def clean_pairs() -> Callable[..., pd.DataFrame]:
    return _pairs


@pytest.fixture(scope="session")
def row_number() -> Callable[[int], int]:
    return _row_number


@pytest.fixture(scope="session")
def failed() -> Callable[[GateReport], dict[str, Finding]]:
    """Failed findings by rule name without the subject."""
    return lambda report: {f.rule.split("/")[1]: f for f in report.findings if not f.passed}
