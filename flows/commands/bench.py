"""The body of `dpo bench`: measures training speed and memory against TRL's and prints a table."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from dpo_core.bench.speed_comparison import Bench, compare
from dpo_core.models.config import ModelConfig
from dpo_core.models.load import convert
from flows.commands.terminal import terminal
from tasks.recipe.read import with_overrides


def run_bench(overrides: Sequence[str], as_json: bool) -> None:
    """Measure and print.

    Raises:
        RecipeError: a setting is not valid, or TRL is not installed.
        StageFailed: a contender failed, or their losses differ.
    """
    bench = with_overrides(
        Bench, {}, overrides, "the comparison cannot be run", "See the fields in dpo bench --help"
    )
    console = terminal(stderr=True)
    with tempfile.TemporaryDirectory(prefix="dpo-bench-") as folder:
        work = Path(folder)
        if bench.model is not None and not Path(bench.model, "config.json").exists():
            convert(ModelConfig(name=bench.model), work / "imported")
            bench = bench.model_copy(update={"model": str(work / "imported")})
        measured = compare(bench, work, console.print)
    print(json.dumps(measured, indent=1)) if as_json else terminal().print(_table(measured))


def _table(measured: dict[str, Any]) -> Table:
    results, bench = measured["results"], measured["bench"]
    model = (bench["model"] and "own model") or bench["size"]
    hardware = measured["hardware"]
    peaks = ", ".join(f"{name} {rate:.3g}" for name, rate in hardware["matmul_tflops"].items())
    table = Table(
        title=f"{bench['workload']}, {model}, {hardware['device']}",
        caption=f"TFLOP/s of square matrix products: {peaks}. "
        "Useful: the minimum that the pairs need; real: what was computed.",
    )
    for column in ("", "pairs/s", "rounds", "tokens/s", "TFLOP/s useful", "real", "peak memory"):
        table.add_column(column, justify="left" if not column else "right")
    for name in ("ours", "trl"):
        if name in results:
            result = results[name]
            rounds = " ".join(f"{rate:.3g}" for rate in result["rounds"])
            memory = f"{result['peak_bytes'] / 2**30:.2f} GiB"
            rates = f"{result['pairs_per_second']:.3g}", rounds, f"{result['tokens_per_second']:.0f}"
            flops = f"{result['useful_tflops']:.3g}", f"{result['real_tflops']:.3g}"
            table.add_row(f"{name} ({_settings(bench[name])})", *rates, *flops, memory)
    if "ratio" in results:
        ratio = results["ratio"]
        times = f"{ratio['pairs_per_second']:.2f}"
        table.add_row("ratio", times, "", "", times, "", f"{ratio['peak_bytes']:.2f}")
    return table


def _settings(settings: dict[str, Any]) -> str:
    """The settings that are on, such as `bf16, pack_tokens 4096`."""
    words = [settings["precision"]]
    words += [f"{k} {v}" for k, v in settings.items() if k != "precision" and v is not False]
    return ", ".join(words).replace("compile True", "compiled")
