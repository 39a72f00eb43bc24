"""`dpo methods`: what the registry holds."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpo_core import methods as package
from dpo_core.errors import RecipeError
from dpo_core.methods import registry
from flows.cli.main import app
from tasks.recipe.policies import CLASSES

NEW = '''
"""A method in a file of its own."""

from dataclasses import replace

from dpo_core.methods.sft import METHOD as SFT

METHOD = replace(SFT, name="imitate", policy=True)
'''


def _listed(*arguments: str) -> list[dict]:
    done = CliRunner().invoke(app, ["methods", "--json", *arguments])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_every_method_is_listed_with_what_it_needs() -> None:
    listed = {facts["name"]: facts for facts in _listed()}
    assert set(listed) == set(registry.methods())
    assert {name for name, facts in listed.items() if facts["policy"]} == set(CLASSES)
    assert listed["dpo"]["needs"] == ["pairs", "cached reference log-probs"]
    assert listed["grpo"]["needs"] == ["prompts", "reference in memory", "reward"]
    assert all(facts["citation"] and facts["curves"] for facts in listed.values())


def test_a_method_shows_its_settings() -> None:
    text = CliRunner().invoke(app, ["methods", "ppo"]).stdout
    assert "kl_coef = 0.05: Weight of the per-token KL penalty in the reward." in text
    assert _listed("ppo")[0]["settings"]["properties"]["kl_coef"]["default"] == 0.05


def test_an_unknown_method_is_told_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"no method 'gpro' \(did you mean grpo\?\)"):
        registry.get("gpro")


def test_a_new_file_declares_a_new_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imitate.py").write_text(NEW)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    registry.methods.cache_clear()
    try:
        assert registry.get("imitate").policy
    finally:
        monkeypatch.undo()
        registry.methods.cache_clear()
