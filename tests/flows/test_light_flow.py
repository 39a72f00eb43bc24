"""The process of a flow only orchestrates: a complete run loads no PyTorch and stays small."""

import json

# Everything that computes with a model is a job's; see dpo_core/jobs.
HEAVY = {"torch", "transformers", "deepspeed", "accelerate", "safetensors", "great_expectations"}


def test_a_complete_run_loads_no_torch_and_takes_little_memory(finished):
    bench, report = finished
    assert "ran" in bench.states(report).values()
    footprint = json.loads(bench.footprint.read_text())
    assert sorted(HEAVY & set(footprint["packages"])) == []
    assert footprint["peak_bytes"] < 600e6
