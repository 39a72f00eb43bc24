"""One million rows of about 700 characters: under two minutes and 4 GB, generating the rows aside.

Runs as a script in a process of its own, so that the peak memory is its own: `test_bench.py ROWS FOLDER`.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest


def big_frame(rows: int) -> Any:
    """Chat pairs of about 700 characters, a few of them broken, as the reader would give them."""
    import numpy as np
    import pandas as pd
    import pyarrow as pa

    rng = np.random.default_rng(0)
    words = np.array([f"word{i}" if i % 3 else f"thé{i}" for i in range(5000)], dtype=object)

    def text(count: int, chars: int, head: str = "", tail: str = "") -> list[str]:
        long = " ".join(words[rng.integers(0, 5000, 200_000)])
        starts = rng.integers(0, len(long) - chars, count)
        return [f"{head}{i} the {long[s : s + chars]}{tail}" for i, s in enumerate(starts.tolist())]

    parts = []
    for start in range(0, rows, 100_000):
        n = min(100_000, rows - start)
        columns = {
            "id": [f"{start + i:064d}" for i in range(n)],
            "row": np.arange(start + 1, start + n + 1),
            "prompt": text(n, 280, f'[{{"role":"user","content":"row {start} ', '"}]'),
            "chat": np.ones(n, dtype=bool),
            "chosen": text(n, 190),
            "rejected": text(n, 170),
            "chosen_ended": np.ones(n, dtype=bool),
            "rejected_ended": np.ones(n, dtype=bool),
            "agreement": np.ones(n),
            "fault": [""] * n,
            "split": np.where(rng.random(n) < 0.05, "eval", "train"),
        }
        columns["chosen"][7] = ""
        columns["rejected"][9] = columns["chosen"][9]
        parts.append(pa.table(columns))
    strings = {pa.string(): pd.StringDtype("pyarrow")}
    return pa.concat_tables(parts).to_pandas(types_mapper=strings.get)


def measure(rows: int, folder: Path) -> dict[str, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from expectations.config import GateConfig
    from expectations.features import Tokenisation
    from expectations.gate import judge
    from tests.support.frames import PlainTokens

    frame = big_frame(rows)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(frame["chosen"].head(5000).tolist(), trainer)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    report, kept = judge(
        frame,
        subject="pairs",
        config=GateConfig(quarantine="drop"),
        docs_dir=folder,
        # 512 bytes do not hold a row, 512 tokens do: every row is a candidate, and the estimate is exercised.
        tokenisation=Tokenisation(PlainTokens(lambda text: bpe.encode(text).ids), 512, 256, ["<|mine|>"]),
    )
    return {
        "rows": rows,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "before_gb": round(before / 2**20, 2),
        "characters": int(sum(frame[c].str.len().mean() for c in ("prompt", "chosen", "rejected"))),
        "dropped_by": report.dropped_by,
        "refused": report.refused,
        "kept": len(kept),
        "failed": [f.message for f in report.findings if not f.passed],
    }


@pytest.mark.bench
@pytest.mark.timeout(900)
def test_a_million_rows(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, __file__, "1000000", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(root), "GX_ANALYTICS_ENABLED": "false"},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    print(figures)
    assert figures["dropped_by"] == {"pairs/empty_chosen": 10, "pairs/identical": 10}
    assert figures["kept"] == 1_000_000 - 20
    assert not figures["refused"]
    assert figures["seconds"] < 120
    assert figures["peak_gb"] < 4


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), Path(sys.argv[2]))))
