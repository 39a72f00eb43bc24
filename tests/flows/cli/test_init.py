"""`dpo init` writes a recipe that fits the data: what is held out, the lengths and the chat template."""

import json
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dpo_core.data.load import load
from dpo_core.data.split import split_table
from dpo_core.errors import RecipeError
from flows.commands.init import write_recipe
from tasks.recipe.read import load_recipe
from tasks.recipe.recipe import Recipe
from tests.support.models.tiny import make_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder of a model's tokenizer, with a chat template; no weights are needed."""
    folder = tmp_path / "model"
    make_tokenizer().save_pretrained(folder)
    return folder


def made(
    rows: list[dict[str, Any]], model: Path, monkeypatch: pytest.MonkeyPatch, reward: str | None = None
) -> tuple[Recipe, str]:
    """The recipe for these rows, and its text."""
    monkeypatch.chdir(model.parent)
    Path("my data.v2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_recipe("my data.v2.jsonl", "model", reward, None)
    return load_recipe("my-data.yaml"), Path("my-data.yaml").read_text()


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Is {i} odd?", "chosen": "yes " * 9 + str(i), "rejected": "no"} for i in range(count)]


def test_a_recipe_of_questions(model, monkeypatch, capsys):
    recipe, text = made(pairs(144), model, monkeypatch)
    assert recipe.name == "my-data"
    assert recipe.data.path == str(model.parent / "my data.v2.jsonl")
    assert recipe.model.name == str(model)
    assert recipe.tokens.template == "chat"
    frame = split_table(load(recipe.data), recipe.data)
    held_out = int((frame["split"] == "eval").sum())
    assert recipe.promotion.min_prompts <= held_out < 40
    assert f"{held_out} of 144 prompts are held out" in text
    longest = max(len(make_tokenizer()(row["chosen"])["input_ids"]) for row in pairs(144))
    assert longest < recipe.evaluate.sampling.max_new_tokens < 2 * longest
    assert "--set 'sft={enabled: false}'" in text
    assert "next: dpo validate 'my data.v2.jsonl' --recipe my-data.yaml" in capsys.readouterr().out
    with pytest.raises(RecipeError, match=r"my-data\.yaml exists"):
        write_recipe("my data.v2.jsonl", "model", None, None)


def test_the_trial_that_a_recipe_describes_is_valid(model, monkeypatch):
    _, text = made(pairs(40), model, monkeypatch)
    command = text[text.index("#   dpo run") :].replace("\\\n#", "").removeprefix("#")
    words = shlex.split(command)
    trial = load_recipe(words[2], [after for word, after in pairwise(words) if word == "--set"])
    assert (trial.name, trial.sft.enabled, trial.reward.source) == ("my-data-trial", False, "sentiment")


def test_few_rows_are_said_to_be_of_no_use(model, monkeypatch):
    recipe, text = made(pairs(4), model, monkeypatch)
    assert recipe.data.eval_fraction <= 0.3
    assert "so this run can only show how things work: add data" in text


def test_chats_and_labelled_answers(model, monkeypatch):
    rows = [
        {"prompt": [{"role": "user", "content": f"{i}?"}], "completion": "yes", "label": i % 2 == 0}
        for i in range(40)
    ]
    recipe, text = made(rows, model, monkeypatch, reward="sentiment")
    assert "template" not in text
    assert [policy.method for policy in recipe.policies.values()] == ["kto"]


def test_prompts_alone_need_a_reward(model, monkeypatch):
    rows = [{"prompt": f"Is {i} odd?"} for i in range(40)]
    with pytest.raises(RecipeError, match="Name a known reward with --reward"):
        made(rows, model, monkeypatch)
    recipe, _ = made(rows, model, monkeypatch, reward="sentiment")
    assert recipe.reward.source == "sentiment"
    assert not recipe.sft.enabled
    assert recipe.pairs.sampling.max_new_tokens == recipe.evaluate.sampling.max_new_tokens == 64
