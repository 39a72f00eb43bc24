"""kill -9 at random moments of a whole run's life, again and again; each run ends as if nothing had happened.

`DPO_KILLS` and `DPO_SEED` say how many and which. A chain of kills and resumes goes on until its run is
done; then the run is compared with one left in peace, and the next begins in an empty workspace.
"""

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.flows.test_alignment import STAGES
from tests.scenarios.faults.warm import Started, prefect_server, start_cold, start_warm
from tests.scenarios.faults.whole import assert_as_undisturbed, left_running
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.processes import jobs_among
from tests.support.runs.tiny_run import Bench, tiny_recipe

pytestmark = [pytest.mark.faults, pytest.mark.timeout(4 * 3600)]

KILLS = int(os.environ.get("DPO_KILLS", "100"))
SEED = int(os.environ.get("DPO_SEED", "1"))
COLD = 0.1  # share of starts that import everything anew and start Prefect's own server


def make_bench(folder: Path, model: Path) -> Bench:
    folder.mkdir()
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe(model, folder / "runs")))
    return Bench(folder)


def done(bench: Bench) -> list[str]:
    """The stages that the store holds."""
    index = bench.workspace / "store" / "index"
    return [stage for stage in STAGES if any((index / stage.partition(" ")[0]).glob("*.json"))]


def storing(bench: Bench) -> bool:
    return any((bench.workspace / "store" / "tmp").glob("*"))


def starting(bench: Bench, log: Path, cold: bool) -> Started:
    """Go on with the run on record, or begin one."""
    known = list((bench.workspace / "runs").glob("*/run.json"))
    arguments = ["run", str(bench.recipe), *(["--resume"] if known else [])]
    if not cold:
        return start_warm(arguments, bench.folder, log)
    environment = bench.environment() | {"PREFECT_HOME": str(bench.folder / "prefect")}
    environment.pop("PREFECT_API_URL", None)
    return start_cold(bench.command(*arguments), environment, bench.folder, log)


class Moments:
    """Draws when to kill. The durations are those of the run left in peace, and follow the machine's load."""

    def __init__(self, chance: random.Random, warm_up: float, seconds: dict[str, float], end: float) -> None:
        self.chance, self.warm_up, self.seconds, self.end = chance, warm_up, seconds, end

    def draw(self, bench: Bench, cold: bool) -> Callable[[Started], bool]:
        """A question to ask of a run again and again until it says that the moment has come."""
        start, left = time.monotonic(), [stage for stage in STAGES if stage not in done(bench)]
        where = self.chance.choice(["life", "life", "storing", "after", "end"])
        if where == "life" or not left:
            life = self.warm_up * (4 if cold else 1) + sum(self.seconds[s] for s in left) + self.end
            moment = start + self.chance.uniform(0, life)
            return lambda run: time.monotonic() >= moment
        # Renames and the writing of reports are over in an instant: a moment beside them is drawn.
        stage = STAGES[-1] if where == "end" else self.chance.choice(left)
        delay = self.chance.uniform(0, {"storing": 0.03, "after": 0.5, "end": 1.5 * self.end}[where])
        seen: list[float] = []

        def come(run: Started) -> bool:
            if not seen and (stage in done(bench) if where != "storing" else self._stores(bench, run, stage)):
                seen.append(time.monotonic())
            return bool(seen) and time.monotonic() >= seen[0] + delay

        return come

    @staticmethod
    def _stores(bench: Bench, run: Started, stage: str) -> bool:
        return storing(bench) and f"{stage}: running" in run.said()


def place_of(said: str) -> str:
    """Where in its life a run is, by what it has logged."""
    lines = [line.split("  ", 1)[1] for line in said.splitlines() if "  " in line and ": " in line]
    staged = [line.partition(": ") for line in lines if line.partition(": ")[0] in STAGES]
    if not staged:
        return "start-up"
    stage, _, state = staged[-1]
    if state == "running" or " of " in state:
        return stage
    return "summary" if stage == STAGES[-1] else "between stages"


def ranks_of(run: Started) -> list[psutil.Process]:
    """The processes of its jobs, without those that only start and watch them."""
    return jobs_among(run.family())


def strike(run: Started, chance: random.Random) -> str:
    """Kill the flow, all of it at once, or one of its trainers' ranks; tells which."""
    how = chance.choice(["flow"] * 6 + ["power"] * 2 + ["rank"] * 2)
    ranks = ranks_of(run) if how == "rank" else []
    if ranks:
        ranks[0].kill()
        status = run.wait()
        assert status in (0, 4), run.said()
        assert status == 0 or "to resume: dpo run" in run.said()
        return "rank"
    if how == "power":
        run.cut_power()
        return how
    run.kill()
    return "flow"


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A folder with Prefect's server for the warm starts, and the model."""
    folder = tmp_path_factory.mktemp("kills")
    model = make_tiny_model(folder / "model", taught=True)
    with pytest.MonkeyPatch.context() as patch, prefect_server(folder / "prefect") as address:
        for name, value in {
            "PREFECT_API_URL": address,
            "PREFECT_HOME": str(folder / "home"),
            "MLFLOW_TRACKING_URI": "",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }.items():
            patch.setenv(name, value)
        yield folder, model


def in_peace(bench: Bench, chance: random.Random) -> Moments:
    """One run without a kill: what the others are compared with, and how long its parts take."""
    log, start, first = bench.folder / "log", time.monotonic(), 0.0
    run, finished = start_warm(["run", str(bench.recipe)], bench.folder, log), {}
    while run.ended() is None:
        time.sleep(0.05)
        if not first and "load-data: running" in run.said():
            first = time.monotonic()
        for stage in done(bench):
            finished.setdefault(stage, time.monotonic())
    assert run.ended() == 0, run.said()
    times = [first, *(finished[stage] for stage in STAGES)]
    seconds = {stage: max(0.1, b - a) for stage, a, b in zip(STAGES, times[:-1], times[1:], strict=True)}
    return Moments(chance, first - start, seconds, max(0.5, time.monotonic() - times[-1]))


class Tally:
    """What was killed where, told as it happens."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys, self._began = capsys, time.monotonic()
        self.kills = 0
        self.places: Counter[str] = Counter()
        self.ways: Counter[str] = Counter()

    def add(self, way: str, place: str, stored: bool) -> None:
        self.kills += 1
        self.places[place + (", storing" if stored else "")] += 1
        self.ways[way] += 1
        self.tell(f"kill {self.kills}: {way} in {place}{', storing' * stored}")

    def tell(self, text: str) -> None:
        with self._capsys.disabled():
            print(f"{time.monotonic() - self._began:6.0f} s  {text}", flush=True)


def killed_again_and_again(bench: Bench, moments: Moments, tally: Tally) -> list[int]:
    """Begin a run and kill it until it is done, or until there are kills enough; the flows' numbers."""
    flows: list[int] = []
    while True:
        cold = moments.chance.random() < COLD
        come = moments.draw(bench, cold)
        run = starting(bench, bench.folder / f"start-{len(flows)}.log", cold)
        flows.append(run.pid)
        while run.ended() is None and not (tally.kills < KILLS and come(run)):
            time.sleep(0.01)
        status = run.ended()
        if status is None:
            place, stored = place_of(run.said()), storing(bench)
            way = strike(run, moments.chance)
            tally.add(way + " of a cold start" * cold, place, stored)
            if run.ended() != 0:
                continue
        # The kill before this start may have come after the last word of the run.
        assert status in (None, 0) or "no unfinished run" in run.said(), f"start {len(flows)}:\n{run.said()}"
        return flows


def test_a_hundred_kills_change_nothing(room, capsys):
    folder, model = room
    tally, faults, chains = Tally(capsys), [], 0
    peace = make_bench(folder / "peace", model)
    moments = in_peace(peace, random.Random(SEED))
    assert_as_undisturbed(peace, peace)
    while tally.kills < KILLS:
        chains += 1
        bench = make_bench(folder / f"chain-{chains}", model)
        flows = killed_again_and_again(bench, moments, tally)
        try:
            assert_as_undisturbed(bench, peace)
            assert not left_running(bench.workspace)
            tally.tell(f"run {chains} is as the undisturbed one after {len(flows)} starts")
        except AssertionError as fault:
            faults.append(f"chain {chains} ({len(flows)} starts): {fault}")
            tally.tell(f"FAULT in {bench.folder}: {str(fault)[:1500]}")
    tally.tell(f"{tally.kills} kills of {chains} runs, seed {SEED}; {dict(tally.ways)}")
    for place, count in tally.places.most_common():
        tally.tell(f"  {count:4} in {place}")
    assert not faults, "\n".join(faults)
