"""Reads rows of Parquet files."""

from pathlib import Path
from typing import Any

import pandas as pd


def read_parquet(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a parquet file as dictionaries."""
    return pd.read_parquet(path).to_dict("records")
