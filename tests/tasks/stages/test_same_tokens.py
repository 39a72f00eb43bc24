"""A model from outside the run must have the same tokens as the run's model."""

from pathlib import Path

import pytest

from dpo_core.errors import RecipeError
from tasks.stages.same_tokens import require_same_tokens
from tests.support.models.tiny import make_tokenizer
from tests.support.runs.contexts import make_context


def test_another_vocabulary_is_refused_and_the_same_one_is_not(tmp_path: Path) -> None:
    tokenizer, context = make_tokenizer(), make_context(tmp_path)
    tokenizer.save_pretrained(tmp_path / "own")
    tokenizer.save_pretrained(tmp_path / "same")
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "other")
    require_same_tokens(context, tmp_path / "own", tmp_path / "same", "models:/mine@champion", "Name another")
    with pytest.raises(RecipeError, match=r"models:/mine/3 has another tokenizer than the run's model"):
        require_same_tokens(context, tmp_path / "own", tmp_path / "other", "models:/mine/3", "Name another")


def test_another_template_or_end_of_an_answer_is_refused(tmp_path: Path) -> None:
    tokenizer, context = make_tokenizer(), make_context(tmp_path)
    tokenizer.save_pretrained(tmp_path / "own")
    template = tokenizer.chat_template
    tokenizer.chat_template = template.replace("<|assistant|>", "<|model|>")
    tokenizer.save_pretrained(tmp_path / "template")
    with pytest.raises(RecipeError, match="has another chat template than the run's model"):
        require_same_tokens(context, tmp_path / "own", tmp_path / "template", "runs:/a/DPO", "Name another")
    tokenizer.chat_template = template
    tokenizer.eos_token = "a"
    tokenizer.save_pretrained(tmp_path / "end")
    with pytest.raises(RecipeError, match="has another end of an answer than the run's model"):
        require_same_tokens(context, tmp_path / "own", tmp_path / "end", "runs:/a/DPO", "Name another")
