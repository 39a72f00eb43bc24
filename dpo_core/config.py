"""The base of every configuration model.

Each configuration class lives beside the code that reads it; `tasks.recipe.recipe.Recipe` composes them.
"""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen pydantic model that rejects unknown keys, NaN and infinity."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )
