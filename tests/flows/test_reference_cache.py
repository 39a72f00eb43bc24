"""The reference cache behind the real command line: what a new run computes of it."""

import json
import shutil

import pytest


def _facts(bench, report: dict) -> dict:
    """What the cache stage of a run wrote down."""
    sha256 = next(s["sha256"] for s in report["stages"] if s["name"] == "cache-reference")
    for path in (bench.workspace / "store" / "index" / "cache-reference").glob("*.json"):
        manifest = json.loads(path.read_text())["manifest"]
        if manifest["sha256"] == sha256:
            return manifest["extra"]
    raise AssertionError("no manifest of cache-reference")


@pytest.mark.slow
def test_another_rate_beta_and_folder_compute_no_reference_log_prob(finished):
    """The stage itself runs again here: its artifact is gone, so that only the cache can answer."""
    bench, first = finished
    own = bench.copy("elsewhere")
    shutil.rmtree(own.workspace / "store" / "index" / "cache-reference")
    report = own.run(
        "--set", "policies.DPO.optim.learning_rate=3e-5", "--set", "policies.DPO.parameters.beta=0.3"
    )
    assert own.states(report)["cache-reference"] == "ran"
    before, facts = _facts(bench, first), _facts(own, report)
    assert before["computed"] == before["sequences"] > 0
    assert (facts["computed"], facts["from_cache"]) == (0, before["sequences"])


@pytest.mark.faults
def test_tampered_log_probs_are_found_and_computed_again(finished):
    bench, first = finished
    own = bench.copy("tampered")
    shutil.rmtree(own.workspace / "store" / "index" / "cache-reference")
    shards = sorted((own.workspace / "reference_cache").glob("*/shard-*"))
    values = bytearray((shards[0] / "values.npy").read_bytes())
    values[-2] ^= 1
    (shards[0] / "values.npy").write_bytes(values)
    done = own.dpo("run", str(own.recipe), "--json")
    assert done.returncode == 0, done.stderr
    assert "its entries are computed again" in done.stderr
    report = json.loads(done.stdout)
    assert _facts(own, report)["computed"] > 0
    # The same bits as before, so that the training after it need not run again.
    assert {name for name, state in own.states(report).items() if state == "ran"} == {"cache-reference"}
    assert report["evaluation"] == first["evaluation"]
