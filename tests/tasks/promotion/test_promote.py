"""Promotion and rollback on a real registry, in processes that race and processes that are killed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpo_core.errors import PromotionRefused, RecipeError
from tasks.promotion.ledger import Ledger
from tasks.promotion.promote import check, promote, rollback
from tasks.reports.run_report import RunReport
from tests.scenarios.bad_inputs import dpo
from tests.support.runs.promotions import NAME, World, dpo_at_once, dpo_killed


def test_a_promotion_is_recorded_where_people_look(world: World) -> None:
    world.run("first")
    standing = promote(world.workspace, "first", reason="the first that is fit")
    assert (standing.champion, standing.previous, standing.changed) == ("1", None, True)
    world.run("second", f"{NAME} version 1")
    promote(world.workspace, "second")
    assert world.aliases() == {"champion": "2", "previous-champion": "1", "challenger": "2"}
    assert world.tags("1")["dpo.promotion"].endswith(": the first that is fit")
    (_, entry) = Ledger(world.tracker, NAME).read()
    assert (entry.change.run, entry.change.replaced, entry.change.after) == ("second", "1", 1)
    assert entry.change.decision
    assert entry.change.decision.reasons[0].rule == "max_kl"
    assert "@" in entry.change.by
    (ledger,) = [m for m in world.client.search_registered_models() if m.name != NAME]
    assert ledger.name == f"{NAME}.promotions"
    assert "promoted in place of version 1" in world.client.get_model_version(ledger.name, "2").description


def test_promoting_the_champion_again_changes_nothing(world: World) -> None:
    world.run("first")
    first = promote(world.workspace, "first")
    again = promote(world.workspace, "first")
    assert (again.changed, again.change) == (False, first.change)


def test_every_failed_rule_is_told_and_force_is_recorded_as_such(world: World) -> None:
    world.run("weak", promote=False)
    refused = dpo("promote", "weak", "--workspace", str(world.workspace))
    assert refused.code == 5
    assert "min_gain: gain +0.01 [-0.02, 0.04]: not above 0" in refused.err
    assert "max_kl" not in refused.err
    assert world.aliases() == {"challenger": "1"}
    promote(world.workspace, "weak", force=True, reason="a demonstration")
    (entry,) = Ledger(world.tracker, NAME).read()
    assert entry.change.forced
    assert entry.change.overridden == ["min_gain: gain +0.01 [-0.02, 0.04]: not above 0"]
    assert "promoted by force by" in world.tags("1")["dpo.promotion"]


def test_force_without_need_is_no_force(world: World) -> None:
    world.run("fit")
    standing = promote(world.workspace, "fit", force=True)
    assert standing.change
    assert not standing.change.forced


def test_a_decision_on_another_champion_does_not_count(world: World) -> None:
    world.run("first")
    world.run("beside")
    promote(world.workspace, "first")
    with pytest.raises(
        PromotionRefused, match="compared with the reference, but the champion is dpo-tiny vers"
    ) as e:
        promote(world.workspace, "beside")
    assert "present champion: dpo run imdb_sentiment" in e.value.remedy
    assert world.aliases()["champion"] == "1"
    world.run("foretold", f"{NAME} version 9")
    with pytest.raises(PromotionRefused, match="version 9, but the champion is dpo-tiny version 1 now"):
        promote(world.workspace, "foretold")


def test_rollback_brings_the_previous_champion_back(world: World) -> None:
    for number, run in enumerate(("a", "b", "c")):
        world.run(run, f"{NAME} version {number}" if number else "the reference")
        promote(world.workspace, run)
    standing = rollback(world.workspace, reason="c is rude")
    assert (standing.champion, standing.previous) == ("2", "1")
    assert standing.change
    assert (standing.change.run, standing.change.replaced) == ("b", "3")
    assert world.tags("2")["dpo.promotion"].endswith(": c is rude")
    assert rollback(world.workspace, NAME).champion == "1", "a second one goes further back, not to c"
    with pytest.raises(PromotionRefused, match="no previous champion"):
        rollback(world.workspace)
    assert world.aliases() == {"champion": "1", "challenger": "3"}
    promote(world.workspace, "c", force=True)
    assert world.aliases()["previous-champion"] == "1"


def test_rollback_passes_over_versions_that_were_deleted(world: World) -> None:
    for number, run in enumerate(("a", "b", "c")):
        world.run(run, f"{NAME} version {number}" if number else "the reference")
        promote(world.workspace, run)
    world.client.delete_model_version(NAME, "1")
    assert (rollback(world.workspace).champion, world.aliases().get("previous-champion")) == ("2", None)


def test_rollback_asks_for_a_name_where_it_must(world: World) -> None:
    world.run("idle", name="dpo-idle")
    with pytest.raises(PromotionRefused, match="no registered model has a champion"):
        rollback(world.workspace)
    world.run("a")
    promote(world.workspace, "a")
    with pytest.raises(PromotionRefused, match="dpo-tiny has no previous champion"):
        rollback(world.workspace)
    promote(world.workspace, "idle")
    with pytest.raises(RecipeError, match="2 models have a champion: dpo-idle, dpo-tiny"):
        rollback(world.workspace)
    with pytest.raises(RecipeError, match="no registered model dpo-tony"):
        rollback(world.workspace, "dpo-tony")


def test_damaged_weights_never_become_champion(world: World) -> None:
    world.run("a")
    world.run("b", f"{NAME} version 1")
    promote(world.workspace, "a")
    promote(world.workspace, "b")
    world.run("c", f"{NAME} version 2")
    weights = {run: world.workspace / "weights" / run for run in "abc"}

    def refused(problem: str) -> None:
        with pytest.raises(PromotionRefused, match=f"version 3 .*{problem}"):
            promote(world.workspace, "c", force=True)
        with pytest.raises(PromotionRefused, match=f"version 1 .*{problem}"):
            rollback(world.workspace)
        assert world.aliases() == {"champion": "2", "previous-champion": "1", "challenger": "3"}

    for run in "ac":
        (weights[run] / "more.safetensors").write_text("")
    refused("damaged")
    for run in "ac":
        (weights[run] / "more.safetensors").unlink()
        (weights[run] / "model.safetensors").write_text("x")
    refused("damaged")
    for run in "ac":
        shutil.rmtree(weights[run])
    refused("not on this machine")
    shutil.rmtree(weights["b"])
    (standing,) = check(world.workspace)
    assert "version 2 are not on this machine" in standing.notes[0]
    result = dpo("promote", "--check", "--workspace", str(world.workspace))
    assert (result.code, "champions without their weights: dpo-tiny version 2" in result.err) == (4, True)


def test_bad_runs_are_told_apart(world: World) -> None:
    report = world.run("good")

    def spoilt(run_id: str, text: str, status: str = "done") -> str:
        world.record(run_id, status)
        world.report_of(run_id).write_text(text)
        return run_id

    text = report.model_dump_json()
    problems = {
        "nobody": "has no run named nobody. Newest runs: bare, study",
        "../runs/good": "has no run named",
        spoilt("half", text, "running"): "not finished: its status is running",
        spoilt("torn", text[:200]): "damaged or written by another version of dpo. Finish it first: dpo run",
        spoilt("list", "[]"): "missing, damaged or written by another version",
        spoilt("study", '{"study": {}}'): "is a study",
        spoilt("bare", report.model_copy(update={"model": None}).model_dump_json()): "registered no model",
    }
    for run_id, words in problems.items():
        with pytest.raises(RecipeError) as error:
            promote(world.workspace, run_id, force=True)
        assert words in str(error.value)
    world.report_of("list").unlink()
    with pytest.raises(RecipeError, match="missing"):
        promote(world.workspace, "list")
    undecided = RunReport.model_validate_json(text).model_copy(update={"decision": None})
    world.report_of("good").write_text(undecided.model_dump_json())
    with pytest.raises(PromotionRefused, match="made no decision"):
        promote(world.workspace, "good")
    assert world.aliases() == {"challenger": "1"}


def test_a_version_that_is_gone_or_not_the_runs_own_cannot_be_forced(world: World) -> None:
    gone, other = world.run("gone"), world.run("other")
    world.report_of("gone").write_text(gone.model_copy(update={"model": other.model}).model_dump_json())
    with pytest.raises(PromotionRefused, match="version 2, registered by the run gone, does not exist"):
        promote(world.workspace, "gone", force=True)
    world.client.delete_model_version(NAME, "2")
    with pytest.raises(PromotionRefused, match="it was deleted"):
        promote(world.workspace, "other", force=True)


def test_looking_at_an_empty_workspace_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for call in (check, rollback):
        with pytest.raises(RecipeError, match="has no finished run"):
            call(tmp_path / "runs")
    assert os.listdir(tmp_path) == []


def test_the_same_weights_do_not_replace_themselves(world: World) -> None:
    first = world.run("a")
    promote(world.workspace, "a")
    second = world.run("b", "the reference; it is dpo-tiny version 1 itself")
    assert first.model
    assert second.model
    world.client.set_model_version_tag(NAME, "1", "dpo.artifact_sha256", second.model.sha256)
    with pytest.raises(PromotionRefused, match="the weights are those of the champion, dpo-tiny version 1"):
        promote(world.workspace, "b")


def test_a_champion_set_by_hand_is_taken_as_it_stands(world: World) -> None:
    for run in ("a", "b"):
        world.run(run)
    promote(world.workspace, "a")
    world.client.set_registered_model_alias(NAME, "champion", "2")
    (standing,) = check(world.workspace)
    assert standing.notes == ["the alias champion was moved by hand: the last change made version 1 champion"]
    assert standing.champion == "2"
    world.run("c", f"{NAME} version 2")
    assert promote(world.workspace, "c").previous == "2"
    assert rollback(world.workspace).champion == "2"
    assert world.aliases()["previous-champion"] == "1"


def test_a_moved_workspace_takes_its_own_registry_along(world: World, tmp_path: Path) -> None:
    world.run("a")
    copy = tmp_path / "copy"
    shutil.copytree(world.workspace, copy)
    promote(copy, "a")
    assert world.aliases() == {"challenger": "1"}
    assert World(copy).aliases() == {"challenger": "1", "champion": "1"}


@pytest.mark.slow  # the registry decides as it does without the workspace's lock, below
def test_of_eight_processes_at_once_one_wins(world: World) -> None:
    runs = [f"run-{number}" for number in range(8)]
    for run in runs:
        world.run(run)
    ended = dpo_at_once(
        [("promote", run, "--workspace", str(world.workspace)) for run in runs], world.workspace
    )
    _one_winner(ended, world)
    assert len(Ledger(world.tracker, NAME).read()) == 1


@pytest.mark.parametrize("machines", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_of_machines_that_decided_at_once_one_wins(database: Path, tmp_path: Path, machines: int) -> None:
    """Each workspace has a lock of its own: only the registry that they share is left to decide."""
    shared = shutil.copy(database, tmp_path / "shared.db")
    worlds = [World(tmp_path / f"machine-{number}", f"sqlite:///{shared}") for number in range(machines)]
    for number, world in enumerate(worlds):
        world.run(f"run-{number}")
    ended = dpo_at_once(
        [
            ("promote", f"run-{number}", "--workspace", str(world.workspace))
            for number, world in enumerate(worlds)
        ],
        tmp_path,
        decided=True,
    )
    winner = _one_winner(ended, worlds[0])
    late = [e.said for e in ended if e.code == 5]
    assert all(f"was rejected: version {winner} was promoted concurrently" in message for message in late)
    (entry,) = Ledger(worlds[0].tracker, NAME).read()
    assert (entry.change.version, entry.state) == (winner, "done")
    for number in range(1, machines + 1):
        assert ("dpo.promotion" in worlds[0].tags(str(number))) is (str(number) == winner)


@pytest.mark.slow
def test_many_may_finish_a_killed_promotion_at_once(database: Path, tmp_path: Path) -> None:
    shared = shutil.copy(database, tmp_path / "shared.db")
    worlds = [World(tmp_path / f"machine-{number}", f"sqlite:///{shared}") for number in range(6)]
    for number, world in enumerate(worlds):
        world.run(f"run-{number}")
    place = ("--workspace", str(worlds[0].workspace))
    killed = dpo_killed("promote", "run-0", *place, folder=tmp_path, before_write=2)
    assert killed.code == -9, killed.said
    ended = dpo_at_once(
        [("promote", "--check", "--workspace", str(world.workspace)) for world in worlds], tmp_path
    )
    assert [e.code for e in ended] == [0] * 6, "\n".join(e.said for e in ended)
    assert worlds[0].aliases()["champion"] == "1"
    assert "promoted by" in worlds[0].tags("1")["dpo.promotion"]


def _one_winner(ended: list[Any], world: World) -> str:
    messages = "\n".join(e.said for e in ended)
    assert sorted(e.code for e in ended) == [0] + [5] * (len(ended) - 1), messages
    winner = world.aliases()["champion"]
    (won,) = [e.said for e in ended if e.code == 0]
    assert f"{NAME} version {winner} promoted" in won
    return winner


def test_one_that_wakes_late_does_not_put_an_old_champion_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine finishes our change and makes the next one before our own alias is written."""
    for run in ("a", "b"):
        world.run(run)
    promote(world.workspace, "a")
    world.run("c", f"{NAME} version 1")
    point, slept = Ledger._point, []

    def sleepy(ledger: Ledger, alias: str, version: str | None) -> None:
        if alias == "champion" and not slept:
            slept.append(version)
            other = Ledger(World(world.workspace).tracker, NAME)
            mended = other.settle()
            assert mended
            later = mended.model_copy(update={"version": "2", "replaced": "3", "previous": "3", "after": 2})
            assert other.append(later)
            other.settle()
            assert world.aliases()["champion"] == "2"
        point(ledger, alias, version)

    monkeypatch.setattr(Ledger, "_point", sleepy)
    promote(world.workspace, "c")
    assert slept == ["3"]
    assert world.aliases() == {"champion": "2", "previous-champion": "3", "challenger": "3"}


@pytest.mark.faults
def test_a_promotion_killed_before_any_write_is_whole_or_was_never(database: Path, tmp_path: Path) -> None:
    """SIGKILL before each write in turn; then the next command, whichever it is, makes good."""
    base = World.on(database, tmp_path / "base")
    base.run("a")
    promote(base.workspace, "a")
    base.run("b", f"{NAME} version 1")
    killed = 0
    for number in range(40):
        world = _copy(base, tmp_path / str(number))
        place = ("--workspace", str(world.workspace))
        ended = dpo_killed("promote", "b", *place, folder=tmp_path, before_write=number)
        if ended.code == 0:
            break
        assert ended.code == -9, ended.said
        killed += 1
        assert world.aliases()["champion"] in ("1", "2")
        happened = bool(Ledger(world.tracker, NAME).read()[1:])
        kind = number % 3
        if kind == 0:
            (standing,) = check(world.workspace)
            assert standing.champion == ("2" if happened else "1")
        elif kind == 1:
            assert promote(world.workspace, "b").champion == "2"
        elif happened:
            assert rollback(world.workspace).champion == "1"
        else:
            with pytest.raises(PromotionRefused):
                rollback(world.workspace)
        assert check(world.workspace)[0].notes == []
        assert [e.state for e in Ledger(world.tracker, NAME).read()][:1] == ["done"]
        if happened or kind == 1:
            assert "in place of version 1" in world.tags("2")["dpo.promotion"]
        if world.aliases()["champion"] == "2":
            assert world.aliases()["previous-champion"] == "1"
    assert killed == 6, "the ledger, the tag, both aliases and the state are writes"


@pytest.mark.faults
def test_a_rollback_killed_before_any_write_is_whole_or_was_never(database: Path, tmp_path: Path) -> None:
    base = World.on(database, tmp_path / "base")
    base.run("a")
    promote(base.workspace, "a")
    base.run("b", f"{NAME} version 1")
    promote(base.workspace, "b")
    killed = 0
    for number in range(40):
        world = _copy(base, tmp_path / str(number))
        place = ("--workspace", str(world.workspace))
        ended = dpo_killed("rollback", *place, folder=tmp_path, before_write=number)
        if ended.code == 0:
            break
        assert ended.code == -9, ended.said
        killed += 1
        assert world.aliases()["champion"] in ("1", "2")
        happened = bool(Ledger(world.tracker, NAME).read()[2:])
        (standing,) = check(world.workspace)
        assert (standing.champion, standing.previous) == (("1", None) if happened else ("2", "1"))
        assert check(world.workspace)[0].notes == []
    assert killed == 6


def test_a_killed_promotion_of_a_version_since_deleted_is_given_up(database: Path, tmp_path: Path) -> None:
    world = World.on(database, tmp_path / "runs")
    world.run("a")
    place = ("--workspace", str(world.workspace))
    ended = dpo_killed("promote", "a", *place, folder=tmp_path, before_write=3)
    assert ended.code == -9
    assert len(Ledger(world.tracker, NAME).read()) == 1
    world.client.delete_model_version(NAME, "1")
    world.run("b")
    assert promote(world.workspace, "b").champion == "2"
    with pytest.raises(PromotionRefused, match="no previous"):
        rollback(world.workspace)


def _copy(base: World, target: Path) -> World:
    shutil.copytree(base.workspace, target)
    return World(target)


def test_the_command_line_says_what_it_did(world: World) -> None:
    world.run("a")
    place = ("--workspace", str(world.workspace))
    done = dpo("promote", "a", "--reason", "fit", *place)
    assert done.code == 0, done.err
    assert f"{NAME} version 1 promoted by " in done.out
    assert "champion 1, previous-champion none, challenger 1" in done.out
    again = dpo("promote", "a", "--json", *place)
    assert json.loads(again.out)["changed"] is False
    assert "the champion already" in dpo("promote", "a", *place).out
    assert f"{NAME}: champion 1" in dpo("promote", "--check", *place).out
    assert dpo("promote", *place).code == 2
    assert dpo("promote", "nobody", *place).code == 2
    refused = dpo("rollback", *place)
    assert (refused.code, "no previous champion" in refused.err) == (5, True)
    assert os.listdir(world.workspace / "store" / "locks") == [f"promotion-{NAME}.lock"]
