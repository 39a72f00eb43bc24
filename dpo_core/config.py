"""`Config`, the base class of every configuration model.

Each configuration class lives beside the code that reads it; `tasks.recipe.recipe.Recipe` composes them.
"""

import ast
import inspect
import sys
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Config(BaseModel):
    """A frozen pydantic model that rejects unknown keys, NaN and infinity."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        validate_default=True,
        defer_build=True,
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Use the string below each field as its description.

        Pydantic's `use_attribute_docstrings` does the same and takes seven times as long for a recipe.
        """
        file = getattr(sys.modules.get(cls.__module__), "__file__", None)
        texts = _texts_below_fields(file).get(cls.__qualname__, {}) if file else {}
        for name, text in texts.items():
            if name in cls.model_fields and cls.model_fields[name].description is None:
                cls.model_fields[name].description = text

    @model_validator(mode="before")
    @classmethod
    def _merge_section_defaults(cls, values: Any) -> Any:
        """Fill the missing keys of a section from its field's default, not from the defaults of its class.

        A method's `optim` has a learning rate of its own: `optim: {schedule: cosine}` must not change it.
        """
        if not isinstance(values, Mapping):
            return values
        merged = dict(values)
        for name, field in cls.model_fields.items():
            if isinstance(values.get(name), Mapping) and isinstance(field.default, BaseModel):
                merged[name] = {**field.default.model_dump(exclude_unset=True), **values[name]}
        return merged


@cache
def _texts_below_fields(file: str) -> dict[str, dict[str, str]]:
    """The strings below the fields of a module's top-level classes, by class and field."""
    return {
        node.name: {
            field.target.id: inspect.cleandoc(text.value.value)
            for field, text in pairwise(node.body)
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        }
        for node in ast.parse(Path(file).read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }
