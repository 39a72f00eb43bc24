"""Promote a real tiny run; the next one is then held against it."""

import json
from pathlib import Path

import pytest

from tests.support.runs.tiny_run import Bench


@pytest.mark.slow
def test_the_next_run_is_held_against_the_champion(finished: tuple[Bench, dict]) -> None:
    bench, first = finished[0].copy("champion"), finished[1]
    name = first["run"]["name"]
    refused = bench.dpo("promote", name)
    assert refused.returncode == 5, refused.stderr
    assert refused.stderr.startswith(f"error: dpo-tiny version {first['model']['version']} is not promoted: ")
    for reason in first["decision"]["reasons"]:
        assert (reason["text"] in refused.stderr) is not reason["passed"]
    done = bench.dpo("promote", name, "--force", "--reason", "a test", "--json")
    assert done.returncode == 0, done.stderr
    champion = json.loads(done.stdout)
    assert champion["changed"]
    assert champion["change"]["forced"]

    same = bench.run()
    assert (same["model"]["version"], same["model"]["known"]) == (champion["champion"], True)
    (reason,) = same["decision"]["reasons"]
    assert (reason["rule"], same["decision"]["promote"]) == ("new_weights", False)
    page = (bench.workspace / "runs" / same["run"]["name"] / "page.html").read_text()
    assert "<h1>Nothing new: these are the champion" in page
    unchanged = bench.dpo("promote", same["run"]["name"])
    assert (unchanged.returncode, "nothing changed" in unchanged.stdout) == (0, True)

    second = bench.run("--set", "policies.DPO.optim.learning_rate=3e-5")
    title = f"dpo-tiny version {champion['champion']}"
    assert second["decision"]["champion"] == title
    assert title in second["decision"]["reasons"][0]["text"]
    rows = {row["name"]: row for row in second["evaluation"]["policies"]}
    assert rows["Champion"]["reward"] == _row(first, "DPO")["reward"], "the same model on the same prompts"
    assert rows["DPO"]["reward"] != rows["Champion"]["reward"]
    (evaluated,) = (stage for stage in second["stages"] if stage["name"] == "evaluate")
    facts = json.loads((Path(evaluated["uri"].removeprefix("file://")) / "evaluation.json").read_text())
    over = facts["gain_over_champion"]["DPO"]
    gap = rows["DPO"]["reward"]["value"] - rows["Champion"]["reward"]["value"]
    assert over["value"] == pytest.approx(gap, abs=1e-9)
    assert {(r["a"], r["b"]) for r in second["win_rates"]} >= {("DPO", "SFT"), ("DPO", "Champion")}
    page = (bench.workspace / "runs" / second["run"]["name"] / "page.html").read_text()
    assert "Champion" in page
    assert title in page

    again = bench.dpo("promote", second["run"]["name"], "--force", "--reason", "a demonstration", "--json")
    assert json.loads(again.stdout)["previous"] == champion["champion"], again.stderr
    back = bench.dpo("rollback", "--json")
    assert json.loads(back.stdout)["champion"] == champion["champion"], back.stderr


def _row(report: dict, name: str) -> dict:
    return next(row for row in report["evaluation"]["policies"] if row["name"] == name)
