"""Measures training speed and memory of this project's trainer and TRL's, and whether their losses agree.

    python -m tests.benchmarks.speed --set workload=long-answer --set size=135m

Both train on the same pairs, tokens, optimiser and cached reference values, in turns and in processes of
their own. The result is printed as JSON; see `Bench` for the settings and `compare` for the numbers.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from dpo_core.config import Config
from dpo_core.data.tokens.sequences import TokenPair
from dpo_core.errors import DpoError, RecipeError, StageFailed
from dpo_core.models.accelerator import set_accelerator
from dpo_core.models.config import ModelConfig
from dpo_core.models.load import config_in, convert, load_model, load_tokenizer
from dpo_core.reference import sequence_key
from dpo_core.reference.compute import compute
from dpo_core.scoring import flops as cost
from dpo_core.scoring.document import Document
from dpo_core.scoring.matmul_rate import matmul_rate
from dpo_core.scoring.model_shape import shape_of_config
from dpo_core.scoring.precision import Precision
from tasks.recipe.read import with_overrides
from tests.benchmarks.speed.contender import Race, write_pairs
from tests.benchmarks.speed.workloads import Size, Workload, human_pairs, made_pairs, make_model

# How far the losses of single pairs may lie apart: bf16 rounds differently in other batch shapes.
AGREEMENT = {"fp32": 1e-4, "bf16": 0.1}
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
ROOT = Path(__file__).resolve().parents[3]


class OurSettings(Config):
    """How our side runs."""

    precision: Precision = "bf16"
    """bf16: autocast over fp32 weights."""
    pack_tokens: int = Field(4096, ge=64)
    """Tokens in a forward pass."""
    compile: bool = False
    """Compile the decoder layers; the first step, which compiles, is not counted."""


class TrlSettings(Config):
    """How TRL's side runs."""

    precision: Precision = "bf16"
    """bf16: autocast over fp32 weights."""
    micro_batch_size: int = Field(8, ge=1)
    """Pairs in a forward pass."""


class Bench(Config):
    """What is compared."""

    workload: Workload = "hh"
    """hh: human pairs from `data`. The others: random ids with the lengths that their names say."""
    data: str | None = None
    """Preference file of workload hh."""
    model: str | None = None
    """As `model.name` of a recipe; its own tokenizer reads the data. Empty: random weights of `size`."""
    size: Size = "135m"
    """Shape of the random model."""
    pairs: int = Field(32, ge=2)
    """Pairs, each trained on once in every round."""
    batch_size: int = Field(8, ge=1)
    """Pairs in an optimiser step."""
    rounds: int = Field(3, ge=1)
    """Turns of each contender; the median counts."""
    ours: OurSettings = OurSettings()
    """Our side."""
    trl: TrlSettings | None = TrlSettings()
    """TRL's side; null: ours alone."""
    threads: int | None = None
    """CPU threads of each."""
    seed: int = 0
    """Which pairs."""


def compare(bench: Bench, work: Path) -> dict[str, Any]:
    """Run the comparison in the folder `work`; see `Bench`.

    Returns:
        settings; hardware with its rate at square matrix products; for each contender pairs/s (of all rounds,
        and their median), tokens/s, peak memory, and TFLOP/s, useful and real: the least that the pairs need
        (each prompt once, nothing padded, nothing computed twice), and what was really computed; and the
        ratios.

    Raises:
        RecipeError: TRL is not installed, or the workload lacks its data.
        StageFailed: a contender failed, or the two do not compute the same losses.
    """
    if bench.trl is not None and importlib.util.find_spec("trl") is None:
        raise RecipeError("TRL is not installed", "pip install 'dpo-pipeline[bench]', or --set trl=null")
    model, pairs = _prepare(bench, work)
    sides: dict[str, Config] = {"ours": bench.ours}
    if bench.trl is not None:
        sides["trl"] = bench.trl
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(bench.rounds):
        for name, settings in sides.items():
            found[name].append(_race(name, settings, bench, model, work))
            rate = _rate(found[name][-1])
            print(f"round {number + 1} of {bench.rounds}, {name}: {rate:.3f} pairs/s", file=sys.stderr)
        if number == 0 and len(sides) == 2:
            _require_agreement(bench, found)
    needed = _needed(model, pairs)
    results = {name: _summary(rounds, pairs, needed) for name, rounds in found.items()}
    if len(results) == 2:
        results["ratio"] = {
            "pairs_per_second": results["ours"]["pairs_per_second"] / results["trl"]["pairs_per_second"],
            "peak_bytes": results["ours"]["peak_bytes"] / results["trl"]["peak_bytes"],
        }
    rates = {name: matmul_rate(getattr(torch, dtype)) / 1e12 for name, dtype in _DTYPES.items()}
    facts = hardware() | {"matmul_tflops": rates}
    return {"bench": bench.model_dump(mode="json"), "hardware": facts, "results": results}


def _prepare(bench: Bench, work: Path) -> tuple[Path, list[TokenPair]]:
    """Write model and pairs with reference values; returns the model's folder and the pairs."""
    set_accelerator()
    model = work / "model"
    if bench.model is None:
        make_model(bench.size, model, bench.seed)
    elif Path(bench.model, "config.json").exists():
        model = Path(bench.model)
    else:
        convert(ModelConfig(name=bench.model), model)
    if bench.workload == "hh":
        if bench.data is None or bench.model is None:
            raise RecipeError(
                "workload hh needs a preference file and a model with its tokenizer",
                "Add --set data=FILE and --set model=FOLDER",
            )
        pairs = human_pairs(bench.data, load_tokenizer(model), bench.pairs, bench.seed)
    else:
        vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        pairs = made_pairs(bench.workload, vocabulary, bench.pairs, bench.seed)
    sums = _reference_sums(load_model(model), pairs)
    # Off the true values by some nats, or every first loss would be ln 2 whatever the log-probs are.
    off = np.random.default_rng(bench.seed).normal(0, 10, sums.shape)
    write_pairs(
        work / "pairs.json", pairs, [(chosen, rejected) for chosen, rejected in (sums + off).tolist()]
    )
    return model, pairs


def _reference_sums(model: Any, pairs: list[TokenPair]) -> NDArray[np.float64]:
    """(pairs, 2): summed log-probs of both sides. Its GPU is left empty for the contenders."""
    on_gpu = torch.cuda.is_available()
    values: dict[bytes, Any] = {}
    sequences = [s for p in pairs for s in (p.chosen, p.rejected)]
    model.to("cuda" if on_gpu else "cpu")
    compute(model, sequences, precision="fp32", token_budget=4096, save=values.update)
    if on_gpu:
        model.to("cpu")
        torch.cuda.empty_cache()
    sums = [float(values[sequence_key(s)].sum()) for s in sequences]
    return np.array(sums).reshape(-1, 2)


def _needed(model: Path, pairs: list[TokenPair]) -> float:
    """Operations that training on a pair takes at least, on average."""
    shape = shape_of_config(config_in(model))
    total = 0.0
    for pair in pairs:
        document = Document.of(pair.chosen, pair.rejected)
        total += cost.training(shape, *cost.sizes(document, packed=True))
    return total / len(pairs)


def _race(name: str, settings: Config, bench: Bench, model: Path, work: Path) -> dict[str, Any]:
    out, path = work / "result.json", work / "race.json"
    out.unlink(missing_ok=True)
    race = Race.model_validate(
        {
            "contender": name,
            "model": str(model),
            "pairs": str(work / "pairs.json"),
            "out": str(out),
            "batch_size": bench.batch_size,
            "threads": bench.threads or os.cpu_count(),
            **settings.model_dump(),
        }
    )
    path.write_text(race.model_dump_json())
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.speed.contender", str(path)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if done.returncode or not out.exists():
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if done.returncode < 0:
            why = f"killed by signal {-done.returncode}, usually for memory"
        raise StageFailed(f"{name} failed: {why}", "Try smaller batches")
    return json.loads(out.read_text())


def _require_agreement(bench: Bench, found: dict[str, list[dict[str, Any]]]) -> None:
    ours, theirs = (np.array(found[name][0]["first_losses"]) for name in ("ours", "trl"))
    gap = float(np.abs(ours - theirs).max())
    both = {bench.ours.precision, (bench.trl or bench.ours).precision}
    allowed = AGREEMENT["bf16" if "bf16" in both else "fp32"]
    if not gap <= allowed:
        raise StageFailed(
            f"the two compute different losses for the same pairs (by {gap:.2g}; {allowed} is allowed)",
            "A time would compare different work; look at the model's attention and precision",
        )


def _rate(result: dict[str, Any]) -> float:
    # The first step warms up: it allocates, and compiles where that is asked for.
    return result["pairs_per_step"] / statistics.median(result["seconds"][1:] or result["seconds"])


def _summary(rounds: list[dict[str, Any]], pairs: list[TokenPair], needed: float) -> dict[str, Any]:
    rates = [_rate(result) for result in rounds]
    middle = statistics.median(rates)
    tokens = sum(len(side) for pair in pairs for side in (pair.chosen, pair.rejected))
    trained = rounds[0]["pairs_per_step"] * len(rounds[0]["seconds"])
    flops = statistics.median(result["flops"] for result in rounds) / trained
    return {
        "pairs_per_second": middle,
        "rounds": rates,
        # Tokens of both sides with their prompts, as a person counts them, however often they are computed.
        "tokens_per_second": middle * tokens / len(pairs),
        "useful_tflops": middle * needed / 1e12,
        "real_tflops": middle * flops / 1e12,
        "peak_bytes": statistics.median(result["peak_bytes"] for result in rounds),
    }


def hardware() -> dict[str, Any]:
    """What the numbers were measured on."""
    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    model = platform.processor() or platform.machine()
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        names = [
            line.split(":", 1)[1].strip() for line in facts.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    return {"device": f"{os.cpu_count()} cores, {model}", "torch": torch.__version__}


def main() -> int:
    """Measure and print; 2 and one line on stderr where that is not possible."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.speed")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="a field of Bench")
    sets = parser.parse_args().set
    try:
        bench = with_overrides(Bench, {}, sets, "the comparison cannot be run", "See the class Bench")
        with tempfile.TemporaryDirectory(prefix="dpo-bench-") as work:
            print(json.dumps(compare(bench, Path(work)), indent=1))
    except DpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
