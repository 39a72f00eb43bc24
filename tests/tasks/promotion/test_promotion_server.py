"""Promotions from several machines on one real MLflow server, which takes no local paths as sources."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.promotion.ledger import Ledger
from tasks.promotion.promote import check, promote, rollback
from tests.support.runs.promotions import NAME, World, dpo_at_once, dpo_killed
from tests.support.sites.mlflow_server import Server


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    server.start()
    yield server
    server.stop()


@pytest.mark.slow
def test_of_eight_machines_on_a_server_one_wins_and_the_killed_one_is_made_good(
    server: Server, tmp_path: Path
) -> None:
    worlds = [World(tmp_path / f"machine-{number}", server.uri) for number in range(8)]
    for number, world in enumerate(worlds):
        world.run(f"run-{number}")
    ended = dpo_at_once(
        [("promote", f"run-{number}", "--workspace", str(w.workspace)) for number, w in enumerate(worlds)],
        tmp_path,
        decided=True,
    )
    assert sorted(e.code for e in ended) == [0] + [5] * 7, "\n".join(e.said for e in ended)
    first = worlds[0].aliases()["champion"]
    assert [e.change.version for e in Ledger(worlds[0].tracker, NAME).read()] == [first]

    worlds[0].run("next", f"{NAME} version {first}")
    place = ("--workspace", str(worlds[0].workspace))
    # The third write is the first tag: the ledger has the promotion, and no alias knows of it.
    killed = dpo_killed("promote", "next", *place, folder=tmp_path, before_write=2)
    assert killed.code == -9, killed.said
    assert worlds[0].aliases()["champion"] == first
    (standing,) = check(worlds[1].workspace)
    assert (standing.champion, standing.previous) == ("9", first)
    assert standing.notes[0] == "completed the interrupted promotion of dpo-tiny version 9"
    winner = worlds[int(first) - 1]
    assert rollback(winner.workspace, reason="too long").champion == first
    assert promote(worlds[0].workspace, "next").changed, "its decision is of the champion that is back"
