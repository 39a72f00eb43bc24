"""`dpo gc` on real runs: the newer stays cached from end to end, and the champion can be rolled back to."""

import json

import pytest

from tests.support.runs.tiny_run import Bench


def test_a_run_lists_its_stages_and_gc_takes_nothing_from_it(finished: tuple[Bench, dict]) -> None:
    bench, report = finished
    folder = bench.workspace / "runs" / report["run"]["name"]
    listed = [json.loads(line) for line in (folder / "stages.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in listed] == [s["name"].partition(" ")[0] for s in report["stages"]]
    assert set(bench.index()) == {f"{line['stage']}/{line['key']}" for line in listed}
    own = bench.copy("gc-keeps")
    done = own.dpo("gc", "--keep", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["removed"] == []
    assert own.index() == bench.index()


@pytest.mark.slow
def test_after_gc_the_kept_run_is_cached_and_a_rollback_finds_its_weights(
    finished: tuple[Bench, dict],
) -> None:
    bench, first = finished[0].copy("gc"), finished[1]
    assert bench.dpo("promote", first["run"]["name"], "--force", "--reason", "a test").returncode == 0
    changes = ("--set", "policies.DPO.optim.learning_rate=3e-5")
    second = bench.run(*changes)
    assert bench.dpo("promote", second["run"]["name"], "--force", "--reason", "a test").returncode == 0
    assert bench.run(*changes)["stages"], "held against itself"
    before = bench.index()

    foretold = json.loads(bench.dpo("gc", "--keep", "1", "--dry-run", "--json").stdout)
    assert bench.index() == before
    done = json.loads(bench.dpo("gc", "--keep", "1", "--json").stdout)
    assert done == foretold
    assert first["run"]["name"] in done["dropped_runs"]
    gone = {one["what"].split()[-1] for one in done["removed"]}
    of_first = {stage["name"]: stage["sha256"] for stage in first["stages"]}
    assert of_first["evaluate"][:16] in gone
    assert of_first["train-dpo DPO"][:16] not in gone, "a champion to go back to"

    again = bench.run(*changes)
    assert set(bench.states(again).values()) == {"cached"}
    back = bench.dpo("rollback", "--json")
    assert back.returncode == 0, back.stderr
    assert json.loads(back.stdout)["champion"] == first["model"]["version"]
    checked = bench.dpo("promote", "--check")
    assert checked.returncode == 0, checked.stderr
