"""The day that a chat template writes is that of the data's first reading."""

import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.preparation import _dated
from tasks.recipe.read import load_recipe
from tests.support.models.chat_families import TEMPLATES, make_tokenizer

CLOCK = "{{ strftime_now('%d %b %Y') }}" + TEMPLATES["end and a line break"]


@pytest.mark.parametrize(("template", "day"), [(CLOCK, "2024-02-29"), (TEMPLATES["trims"], None)])
def test_only_a_template_that_writes_the_date_gets_one(
    tmp_path: Path, template: str, day: str | None
) -> None:
    make_tokenizer(template).save_pretrained(tmp_path)
    recipe = load_recipe("hh-harmless", ["data.path=pairs.jsonl"])
    loaded: Any = SimpleNamespace(planned=False, extra={"kind": "pairs", "read_on": "2024-02-29"})
    base: Any = SimpleNamespace(planned=False, path=tmp_path)
    dated = _dated(recipe, loaded, base)
    assert dated.tokens.date == (datetime.date.fromisoformat(day) if day else None)
    # It is part of what the keys of later stages are made of.
    assert dated.tokens.model_dump(mode="json")["date"] == day
    own = load_recipe("hh-harmless", ["data.path=pairs.jsonl", "tokens.date=2020-01-02"])
    assert _dated(own, loaded, base).tokens.date == datetime.date(2020, 1, 2)
