"""A model from elsewhere must read the tokens of the run's own model."""

from pathlib import Path

import pytest

from dpo_core.errors import RecipeError
from flows.preparation import require_same_tokens
from tests.support.models.tiny import make_tokenizer


def test_another_vocabulary_is_refused_and_the_same_one_is_not(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "own")
    tokenizer.save_pretrained(tmp_path / "same")
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "other")
    require_same_tokens(tmp_path / "own", tmp_path / "same", "models:/mine@champion")
    with pytest.raises(RecipeError, match=r"models:/mine/3 has another tokenizer than the run's model"):
        require_same_tokens(tmp_path / "own", tmp_path / "other", "models:/mine/3")
