"""`dpo validate --model --show`: rows as the model will see them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli.main import app
from tests.support.models.chat_families import TEMPLATES, make_tokenizer, user


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer(TEMPLATES["end and a line break"]).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"prompt": [user(f"Soup {n}?")], "chosen": f"It was good {n}.", "rejected": "No " * 60 + f"{n}"}
        for n in range(24)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_rows_are_shown_with_ids_and_mask(model: Path, data: Path) -> None:
    done = CliRunner().invoke(app, ["validate", str(data), "--model", str(model), "--show", "2", "--json"])
    report = json.loads(done.stdout)
    assert report["row_count"] == 24
    shown = report["rows"]
    assert [(one["row"], one["side"]) for one in shown] == [
        (row, side) for row in (1, 2) for side in ("chosen", "rejected")
    ]
    assert all(set(one) == {"row", "side", "ids", "learnt", "text"} for one in shown)
    first = shown[0]
    assert len(first["ids"]) == len(first["learnt"])
    assert (
        first["text"]
        == "<|im_start|>user\nSoup 0?<|im_end|>\n<|im_start|>assistant\nIt was good 0.<|im_end|>"
    )
    tokenizer = make_tokenizer(TEMPLATES["end and a line break"])
    learnt = [i for i, on in zip(first["ids"], first["learnt"], strict=True) if on]
    assert tokenizer.decode(learnt) == "It was good 0.<|im_end|>"
    # The rules that need a tokenizer are judged.
    skipped = {one["rule"] for one in report["findings"] if one["skipped"]}
    assert not skipped & {"pairs/over_long", "pairs/special_tokens", "pairs/template"}


def test_learnt_tokens_and_cuts_are_marked_for_people(model: Path, data: Path) -> None:
    settings = ["--set", "tokens.max_length=60", "--set", "tokens.max_prompt_length=30"]
    arguments = ["validate", str(data), "--model", str(model), "--show", "1", *settings]
    said = CliRunner().invoke(app, arguments).stdout
    assert "⟦It was good 0.<|im_end|>⟧" in said
    assert "its end is learnt" in said
    assert "cut: answer" in said
    assert "⟧✂" in said


def test_a_recipe_gives_model_and_settings(model: Path, data: Path, tmp_path: Path) -> None:
    tokens = {"max_length": 60, "max_prompt_length": 30}
    recipe = {"name": "r", "model": {"name": str(model)}, "data": {"openings": 9}, "tokens": tokens}
    sections = {"reward": {"source": "sentiment"}, "sft": {"enabled": False}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | sections))
    done = CliRunner().invoke(app, ["validate", str(data), "--recipe", str(tmp_path / "recipe.yaml")])
    assert "pairs/over_long: " in done.stdout
    assert "set --model or --recipe" not in done.stdout


def test_what_needs_a_model_is_not_left_unread(data: Path) -> None:
    done = CliRunner().invoke(app, ["validate", str(data), "--set", "tokens.max_length=60"])
    assert "Set --model or --recipe" in str(done.exception)
    done = CliRunner().invoke(app, ["validate", str(data)])
    assert "pairs/over_long: not judged: no tokenizer or token budget was given (set --model" in done.stdout
