"""`dpo bench`: speed and memory beside TRL's, on this machine."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from dpo_core.bench.compare import Bench, compare
from dpo_core.models.config import ModelConfig
from dpo_core.models.load import convert
from flows.cli.terminal import terminal
from tasks.recipe.read import with_overrides


def run_bench(overrides: Sequence[str], as_json: bool) -> None:
    """Compare and print.

    Raises:
        RecipeError: a setting cannot be used, or TRL is not installed.
        StageFailed: a contender failed, or the losses of the two do not agree.
    """
    bench = with_overrides(Bench, {}, overrides, "the comparison cannot be run", "See README.md")
    console = terminal(stderr=True)
    with tempfile.TemporaryDirectory(prefix="dpo-bench-") as folder:
        work = Path(folder)
        if bench.model is not None and not Path(bench.model, "config.json").exists():
            convert(ModelConfig(name=bench.model), work / "imported")
            bench = bench.model_copy(update={"model": str(work / "imported")})
        found = compare(bench, work, console.print)
    print(json.dumps(found, indent=1)) if as_json else terminal().print(_table(found))


def _table(found: dict[str, Any]) -> Table:
    results, bench = found["results"], found["bench"]
    what = (bench["model"] and "own model") or bench["size"]
    hardware = found["hardware"]
    peaks = ", ".join(f"{name} {rate:.3g}" for name, rate in hardware["matmul_tflops"].items())
    table = Table(
        title=f"{bench['workload']}, {what}, {hardware['device']}",
        caption=f"TFLOP/s of square matrix products: {peaks}. "
        "Useful: what the pairs need at least; real: what was computed.",
    )
    for column in ("", "pairs/s", "rounds", "tokens/s", "TFLOP/s useful", "real", "peak memory"):
        table.add_column(column, justify="left" if not column else "right")
    for name in ("ours", "trl"):
        if name in results:
            one = results[name]
            rounds = " ".join(f"{rate:.3g}" for rate in one["rounds"])
            memory = f"{one['peak_bytes'] / 2**30:.2f} GiB"
            rates = f"{one['pairs_per_second']:.3g}", rounds, f"{one['tokens_per_second']:.0f}"
            flops = f"{one['useful_tflops']:.3g}", f"{one['real_tflops']:.3g}"
            table.add_row(f"{name} ({_said(bench[name])})", *rates, *flops, memory)
    if "ratio" in results:
        ratio = results["ratio"]
        times = f"{ratio['pairs_per_second']:.2f}"
        table.add_row("ratio", times, "", "", times, "", f"{ratio['peak_bytes']:.2f}")
    return table


def _said(settings: dict[str, Any]) -> str:
    """`bf16, pack_tokens 4096`: what is not off."""
    words = [settings["precision"]]
    words += [f"{k} {v}" for k, v in settings.items() if k != "precision" and v is not False]
    return ", ".join(words).replace("compile True", "compiled")
