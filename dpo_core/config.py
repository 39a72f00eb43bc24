"""The base of every configuration model.

Each configuration class lives beside the code that reads it; `tasks.recipe.recipe.Recipe` composes them.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Config(BaseModel):
    """A frozen pydantic model that rejects unknown keys, NaN and infinity."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _over_the_defaults_of_sections(cls, given: Any) -> Any:
        """Lay a section that is given in part over the default of its field, not over its class's defaults.

        A method's `optim` has a learning rate of its own: `optim: {schedule: cosine}` must not change it.
        """
        if not isinstance(given, Mapping):
            return given
        laid = dict(given)
        for name, field in cls.model_fields.items():
            if isinstance(given.get(name), Mapping) and isinstance(field.default, BaseModel):
                laid[name] = {**field.default.model_dump(exclude_unset=True), **given[name]}
        return laid
