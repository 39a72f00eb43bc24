"""`dpo doctor --model`: one line on whether a model can be aligned, and the same verdict at import."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli.main import app
from tests.support.models.families import make_family
from tests.support.models.tiny import make_tiny_model, make_tokenizer
from tests.support.models.zoo import build

SHORT = ("--set", "tokens.max_length=64", "--set", "tokens.max_prompt_length=32")


def ask(*arguments: str) -> tuple[int, dict[str, str]]:
    """Exit code and answer of `dpo doctor --json`."""
    result = CliRunner().invoke(app, ["doctor", "--json", *arguments])
    # Packages that are imported for the first time may print a warning in front.
    return result.exit_code, json.loads(result.stdout[result.stdout.index("{") :])


def write(folder: Path, model_type: str) -> Path:
    tokenizer = make_tokenizer()
    model = build(model_type, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_that_can_be_packed(tmp_path: Path) -> None:
    code, answer = ask("--model", str(make_tiny_model(tmp_path / "m")), *SHORT)
    assert code == 0
    assert answer["layout"] == "packed"


@pytest.mark.parametrize(("model_type", "reason"), [("bloom", "sdpa"), ("lfm2", "conv layers")])
def test_a_model_that_is_padded_says_why(tmp_path: Path, model_type: str, reason: str) -> None:
    code, answer = ask("--model", str(write(tmp_path / "m", model_type)), *SHORT)
    assert (code, answer["layout"]) == (0, "padded")
    assert reason in answer["reason"]


@pytest.mark.parametrize(
    ("model_type", "reason"), [("bert-generation", "bidirectional"), ("modernbert-decoder", "linear head")]
)
def test_a_model_that_is_refused_says_why(tmp_path: Path, model_type: str, reason: str) -> None:
    code, answer = ask("--model", str(write(tmp_path / "m", model_type)))
    assert (code, answer["layout"]) == (4, "refused")
    assert reason in answer["reason"]


def test_a_model_with_too_few_positions_is_refused(tmp_path: Path) -> None:
    code, answer = ask("--model", str(make_tiny_model(tmp_path / "m")), "--set", "tokens.max_length=513")
    assert (code, answer["layout"]) == (4, "refused")
    assert "512" in answer["reason"]


def test_there_is_no_such_model(tmp_path: Path) -> None:
    code, answer = ask("--model", str(tmp_path / "nothing"))
    assert (code, answer["layout"]) == (4, "refused")


def test_an_override_without_a_model_is_an_error() -> None:
    result = CliRunner().invoke(app, ["doctor", "--set", "tokens.max_length=64"])
    assert result.exit_code != 0


@pytest.mark.usefixtures("real_bf16")
def test_bf16_packs_are_tried_too(tmp_path: Path) -> None:
    """Keys and values of two sizes, which a kernel for bf16 may take for one."""
    code, answer = ask("--model", str(make_family(tmp_path / "m", "deepseek_v3")))
    assert (code, answer["layout"]) == (0, "packed")
