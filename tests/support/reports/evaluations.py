"""An evaluation outside a run, of synthetic numbers."""

from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from tasks.reports.evaluation_report import EvaluatedModel, EvaluationReport
from tasks.reports.run_report import Sample
from tests.support.reports.measured import make_comparison, make_suites, make_win_rates


def make_evaluation_report(**changes: Any) -> EvaluationReport:
    """Two checkpoints held against each other outside a run."""
    policies = ("DPO", "champion")
    parts: dict[str, Any] = {
        "models": [EvaluatedModel(name=n, sha256=sha256(n.encode()).hexdigest()) for n in policies],
        "suites": make_suites(policies),
        "comparisons": [make_comparison("champion")],
        "win_rates": make_win_rates()[2:],
        "samples": [
            Sample(
                prompt="I bought this phone in May\nand the battery",
                completions={"DPO": "still lasts two days. I am impressed.", "champion": "is fine."},
            )
        ],
        "command": "dpo compare runs/calm-otter-17/dpo models:/imdb-dpo@champion --suites all",
        "finished_at": datetime(2025, 3, 1, 12, 0, tzinfo=UTC),
        "hardware": "1 × accelerator with 80 GiB, 16 cores, 128 GiB memory",
        "seconds": 812.4,
    }
    return EvaluationReport(**(parts | changes))
