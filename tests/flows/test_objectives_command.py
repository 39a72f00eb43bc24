"""`dpo objectives`: what a person and what a script gets to see."""

import json

from typer.testing import CliRunner

from dpo_core.objectives import get, names
from flows.cli import app


def test_the_list_says_what_each_needs() -> None:
    result = CliRunner().invoke(app, ["objectives"])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    assert [head.split()[0] for head in heads] == names()
    assert "tdpo2  (pairs, live reference)" in heads
    assert "aot  (pairs, reference, whole batch)" in heads
    assert "kto  (unpaired, reference)" in heads
    assert "simpo  (pairs)" in heads
    place = lines.index("simpo  (pairs)")
    assert "arXiv 2405.14734" in lines[place + 1]
    assert lines[place + 3].startswith("  gamma_beta_ratio = 0.5 in [0, 5]: ")


def test_json_has_everything() -> None:
    result = CliRunner().invoke(app, ["objectives", "--json"])
    assert result.exit_code == 0
    facts = {fact["name"]: fact for fact in json.loads(result.stdout)}
    assert sorted(facts) == names()
    assert facts["tdpo1"]["needs_full_vocabulary"]
    assert facts["tdpo1"]["extras"] == ["kl"]
    assert facts["aot"]["batch_coupled"]
    assert facts["hinge"]["value_at_reference"] == 1.0
    assert facts["sft"]["value_at_reference"] is None
    assert facts["dpo"]["parameters"]["beta"]["default"] == get("dpo").parameters["beta"].default
    assert all(fact["citation"] and fact["definition"] for fact in facts.values())
