"""`dpo gc`: keeps what a kept run needs and removes the rest, despite concurrent runs and kills."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_core.errors import RecipeError
from dpo_core.system import digest_json
from dpo_core.temporary import this_process
from tasks.housekeeping.garbage_collection import Freed, free
from tasks.promotion.promote import check, promote, rollback
from tasks.runs.record import RunRecord, save_run
from tasks.runs.references import record_lookup
from tasks.store.store import ArtifactInfo, Store
from tests.support.runs.promotions import NAME, World, dpo_killed
from tests.support.runs.stored import CONFIG, REPO

_MEMORY = "/dev/shm"
START = datetime(2026, 1, 1, tzinfo=UTC)


class Result(NamedTuple):
    """A result of a stage: number of its content, what it was made from, whether it has an entry."""

    content: int
    parents: tuple[int, ...]
    entry: bool


class PlannedRun(NamedTuple):
    """A run: the results that it went through, and how far it came."""

    results: frozenset[int]
    status: str


@st.composite
def stores(draw: st.DrawFn) -> tuple[list[Result], list[PlannedRun], int]:
    """A graph of results, runs over it, and how many are to be kept."""
    results: list[Result] = []
    for number in range(draw(st.integers(1, 8))):
        # Chains rather than heaps, and now and then the content of another result.
        parents = draw(st.sets(st.sampled_from(range(max(0, number - 2), number)))) if number else set()
        content = draw(st.sampled_from([number, number, number, 0]))
        results.append(Result(content, tuple(sorted(parents)), draw(st.integers(0, 5)) > 0))
    some = st.frozensets(st.sampled_from(range(len(results))), max_size=3)
    status = st.sampled_from(["done", "done", "failed", "running", "study"])
    runs = draw(st.lists(st.builds(PlannedRun, some, status), max_size=5))
    return results, runs, draw(st.integers(0, 3))


def _key(number: int) -> str:
    return digest_json(["stage", number])


def _build(folder: Path, results: list[Result], runs: list[PlannedRun]) -> list[str]:
    """The store and the records of its runs; the digest of each result."""
    store = Store(folder)
    digests: list[str] = []
    for number, result in enumerate(results):
        scratch = store.begin("made", _key(number)) / "out"
        scratch.mkdir()
        (scratch / "data").write_bytes(bytes([result.content]) * 100)
        parents = [digests[parent] for parent in result.parents]
        about = ArtifactInfo("dataset", 1, CONFIG, parents)
        digests.append(store.commit("made", _key(number), scratch, about).sha256)
    for number, result in enumerate(results):
        if not result.entry:
            (store.root / "index" / "made" / f"{_key(number)}.json").unlink()
        (folder / "data_docs" / f"pairs-{_key(number)[:16]}").mkdir(parents=True)
        store.begin("made", _key(number))
    for place, run in enumerate(runs):
        record(folder, f"run-{place}", place, run.status)
        for number in sorted(run.results):
            record_lookup(
                store, f"run-{place}", "made", _key(number), [digests[p] for p in results[number].parents]
            )
        if run.status in ("done", "study"):
            rows = [{"sha256": digests[n], "parents": []} for n in sorted(run.results)]
            report = {"stages": rows} | ({"study": {}} if run.status == "study" else {})
            (folder / "runs" / f"run-{place}" / "report.json").write_text(json.dumps(report))
    return digests


def record(folder: Path, run_id: str, place: int = 0, status: str = "done", **changes: Any) -> None:
    facts = {"started_at": START + timedelta(hours=place)} | changes
    status = "done" if status == "study" else status
    save_run(folder, RunRecord(run_id=run_id, recipe="tiny", status=status, **facts))


def _needed(results: list[Result], runs: list[PlannedRun], keep: int) -> set[int]:
    """The contents that a kept run needs, by the rule as a person would say it."""
    finished = [place for place, run in enumerate(runs) if run.status == "done"]
    let_go = set(finished[: max(len(finished) - keep, 0)])
    needed: set[int] = set()
    for place, run in enumerate(runs):
        if place in let_go:
            continue
        for number in run.results:
            # A failed run wrote down keys alone: without its entry a result is none.
            if results[number].entry or run.status in ("done", "study"):
                needed.add(results[number].content)
            needed |= {results[parent].content for parent in results[number].parents}
    while True:
        made_from = {
            results[parent].content
            for result in results
            if result.content in needed and result.entry
            for parent in result.parents
        }
        if made_from <= needed:
            return needed
        needed |= made_from


def _state(folder: Path) -> dict[str, bytes]:
    """Everything but the locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
        if "locks" not in path.parts
    }


@contextmanager
def _folder() -> Iterator[Path]:
    # In memory where there is such a place: a store flushes every file.
    with tempfile.TemporaryDirectory(dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None) as name:
        yield Path(name)


def unused(freed: Freed) -> set[str]:
    """The beginnings of the digests of removed artifacts."""
    return {item.what.split()[1] for item in freed.removed if "/" not in item.what}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(stores())
def test_what_a_kept_run_needs_stays_and_all_else_goes(
    drawn: tuple[list[Result], list[PlannedRun], int],
) -> None:
    results, runs, keep = drawn
    with _folder() as folder:
        digests = _build(folder, results, runs)
        store = Store(folder)
        before = _state(folder)
        foretold = free(folder, keep=keep, dry_run=True)
        assert _state(folder) == before, "a dry run changes nothing"

        done = free(folder, keep=keep)
        assert done == foretold, "and says exactly what a real one does"
        there = {path.name for path in (store.root / "objects").glob("*/*/*")}
        wanted = {
            digests[n] for n, result in enumerate(results) if result.content in _needed(results, runs, keep)
        }
        assert there == wanted
        assert unused(done) == {digest[:16] for digest in set(digests) - wanted}
        for number, result in enumerate(results):
            manifest = store.lookup("made", _key(number))
            assert (manifest is not None) is (result.entry and digests[number] in wanted)
        assert not list((store.root / "tmp").glob("*"))
        assert sum(len(v) for v in before.values()) - sum(len(v) for v in _state(folder).values()) >= (
            done.freed_bytes
        )

        again = free(folder, keep=keep)
        assert (again.removed, again.freed_bytes) == ([], 0)


def test_scratch_is_kept_for_the_unfinished_run_alone(tmp_path: Path) -> None:
    results = [Result(0, (), False), Result(1, (), True), Result(2, (), False)]
    _build(tmp_path, results, [PlannedRun(frozenset({0, 1}), "failed")])
    free(tmp_path)
    assert [path.name for path in (tmp_path / "work" / "made").iterdir()] == [_key(0)[:16]]


def test_scratch_of_a_command_at_work_stays(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.lock("job", _key(0)):
        work = store.begin("job", _key(0))
        free(tmp_path)
        assert work.is_dir()
    free(tmp_path)
    assert not work.exists()


def test_a_run_whose_record_cannot_be_read_keeps_what_it_looked_up(tmp_path: Path) -> None:
    _build(tmp_path, [Result(0, (), True), Result(1, (), True)], [PlannedRun(frozenset({0}), "done")])
    (tmp_path / "runs" / "run-0" / "run.json").write_text("{")
    assert len(unused(free(tmp_path, keep=0))) == 1
    assert Store(tmp_path).lookup("made", _key(0)) is not None


def test_named_runs_are_kept_and_let_go(tmp_path: Path) -> None:
    results = [Result(number, (), True) for number in range(3)]
    runs = [PlannedRun(frozenset({number}), "done") for number in range(3)]
    _build(tmp_path, results, runs)
    done = free(tmp_path, keep=1, keep_runs=["run-0"], drop_runs=["run-2"])
    assert [(item.what, item.why) for item in done.kept] == [("run run-0", "named")]
    assert (done.dropped_runs, len(unused(done))) == (["run-1", "run-2"], 2)


def test_a_run_at_work_is_not_let_go_and_a_name_must_be_known(tmp_path: Path) -> None:
    record(tmp_path, "busy", status="running", owner=this_process())
    with pytest.raises(RecipeError, match="the run busy is in progress"):
        free(tmp_path, drop_runs=["busy"])
    with pytest.raises(RecipeError, match="no run named nothing"):
        free(tmp_path, keep_runs=["nothing"])


def test_evaluated_models_stay(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number, weights in enumerate(["aa", "bb"]):
        (store.begin("train", _key(number)) / "weights").write_bytes(bytes([number]))
        source = {"weights": store.begin("train", _key(number)) / "weights"}
        about = ArtifactInfo("model", 1, CONFIG, extra={"weights_sha256": weights})
        store.commit("train", _key(number), source, about)
    (tmp_path / "evaluations" / "one").mkdir(parents=True)
    (tmp_path / "evaluations" / "one" / "report.json").write_text('{"models": [{"sha256": "bb"}]}')
    (kept,) = free(tmp_path).kept
    assert kept.why == "evaluated"
    assert store.lookup("train", _key(0)) is None
    assert store.lookup("train", _key(1)) is not None


def test_what_a_rollback_needs_stays_and_older_champions_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    world = World(tmp_path)
    store = Store(tmp_path)
    for number in range(4):
        report = world.run(f"run-{number}", "the reference" if number == 0 else f"{NAME} version {number}")
        assert report.model
        weights = store.root / "objects" / "model" / report.model.sha256[:2] / report.model.sha256
        shutil.copytree(Path(report.model.uri.removeprefix("file://")), weights)
        world.client.set_model_version_tag(NAME, str(number + 1), "dpo.weights_uri", weights.as_uri())
        if number < 3:
            promote(tmp_path, f"run-{number}")
    assert world.aliases() == {"champion": "3", "previous-champion": "2", "challenger": "4"}
    done = free(tmp_path, keep=0)
    assert [(item.what[-9:], item.why) for item in done.kept] == [
        ("version 2", "previous-champion"),
        ("version 3", "champion"),
        ("version 4", "challenger"),
    ]
    assert len(unused(done)) == 1, "that of version 1"
    assert all(standing.sound for standing in check(tmp_path))
    assert rollback(tmp_path).champion == "2"


def test_a_promotion_that_was_cut_off_keeps_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger has it, and no alias does yet."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    world = World(tmp_path)
    report = world.run("first")
    assert report.model
    world.client.delete_registered_model_alias(NAME, "challenger")
    killed = dpo_killed("promote", "first", "--workspace", str(tmp_path), folder=tmp_path, before_write=2)
    assert (killed.code, world.aliases()) == (-9, {})
    sha256 = report.model.sha256
    (tmp_path / "store" / "objects" / "model" / sha256[:2] / sha256).mkdir(parents=True)
    assert unused(free(tmp_path, keep=0)) == set()


def test_a_stage_asked_for_while_gc_looks_is_not_lost(tmp_path: Path) -> None:
    """A run that begins in the middle: it waits for gc, and then finds the store as it is."""
    digests = _build(tmp_path, [Result(0, (), True)], [])
    store = Store(tmp_path)
    code = (
        "import sys; from tasks.runs.references import record_lookup; from tasks.store.store import Store\n"
        "store = Store(sys.argv[1]); print('ready', flush=True)\n"
        "record_lookup(store, 'busy', 'made', sys.argv[2], []); print('noted', flush=True)"
    )
    record(tmp_path, "busy", status="running", owner=this_process())
    with store.guard():
        run = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), _key(0)], cwd=REPO, text=True, stdout=subprocess.PIPE
        )
        assert run.stdout
        assert run.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            run.wait(0.3)
    assert run.wait(20) == 0
    assert unused(free(tmp_path)) == set()
    assert store.lookup("made", _key(0)).sha256 == digests[0]  # type: ignore[union-attr]


def test_a_result_is_not_seen_before_its_entry_is(tmp_path: Path) -> None:
    """A commit in the middle of gc: else the object, still without an entry, would be taken for garbage."""
    store = Store(tmp_path)
    code = (
        "import sys; from tasks.store.store import Store; from tests.support.runs.stored import make\n"
        "print('ready', flush=True); make(Store(sys.argv[1]), {'a': b'1'})"
    )
    with store.guard():
        run = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], cwd=REPO, text=True, stdout=subprocess.PIPE
        )
        assert run.stdout
        assert run.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            run.wait(1)
        assert not list((store.root / "objects").glob("*/*/*"))
    assert run.wait(20) == 0
    assert len(list((store.root / "objects").glob("*/*/*"))) == 1


def _killed(workspace: Path, step: int) -> int:
    """gc in a process that SIGKILL ends before its n-th change of the disk; its status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = step

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return call(*args, **kwargs)

        return change

    os.rename, os.unlink, os.rmdir = counted(os.rename), counted(os.unlink), counted(os.rmdir)
    Path.unlink = counted(Path.unlink)  # type: ignore[method-assign]
    try:
        free(workspace, keep=1)
        os._exit(0)
    finally:
        os._exit(1)


def test_killed_at_any_step_it_leaves_no_entry_without_its_object() -> None:
    with _folder() as folder:
        _kill_at_every_step(folder)


def _kill_at_every_step(folder: Path) -> None:
    results = [Result(0, (), True), Result(1, (0,), True), Result(2, (), True), Result(3, (2,), True)]
    _build(
        folder / "whole", results, [PlannedRun(frozenset({1}), "done"), PlannedRun(frozenset({3}), "done")]
    )
    for step in range(60):
        own = folder / f"killed-{step}"
        shutil.copytree(folder / "whole", own)
        ended = _killed(own, step)
        store = Store(own)
        for path in (store.root / "index").glob("*/*.json"):
            assert store.peek("made", path.stem) is not None, f"an entry without its object at step {step}"
        assert {store.lookup("made", _key(number)) is None for number in (2, 3)} == {False}
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        free(own, keep=1)
        assert len(list((store.root / "objects").glob("*/*/*"))) == 2
        assert not list((store.root / "tmp").iterdir())
    assert 10 < step < 59
