"""Settings of the judge, which decides which of two answers is better."""

from typing import Literal

from pydantic import Field, model_validator

from dpo_core.config import Config
from dpo_core.errors import RecipeError
from dpo_core.judging.client import Endpoint
from dpo_core.judging.prompts import find_template


class JudgeConfig(Config):
    """The judge, which decides which of two answers is better."""

    kind: Literal["reward", "reward_model", "llm"] = "reward"
    """A known reward, a trained reward model, or a language model behind an API."""
    source: str = "sentiment"
    """For a reward: a value of `reward.source`. For a reward model: its folder."""
    endpoint: Endpoint | None = None
    """The API of the language model."""
    template: str = "dialogue"
    """Its prompt: `summary`, `summary_strict`, `dialogue`, `harmless` or `instruction`."""
    both_orders: bool = True
    """Ask about each pair twice, with the answers exchanged; else once, in an order drawn from the texts."""
    unusable: float = Field(0.2, ge=0, le=1)
    """Share of comparisons without a usable verdict above which the judgement fails."""

    @model_validator(mode="after")
    def _complete(self) -> "JudgeConfig":
        find_template(self.template)
        if (self.kind == "llm") != (self.endpoint is not None):
            raise RecipeError(
                f"judge.kind is '{self.kind}', and judge.endpoint is {'set' if self.endpoint else 'not set'}",
                "Set judge.kind to llm, or remove judge.endpoint"
                if self.endpoint
                else "Set judge.endpoint.base_url and judge.endpoint.model too",
            )
        return self

    @property
    def name(self) -> str:
        """The judge's name in tables."""
        if self.endpoint is not None:
            return self.endpoint.model
        return self.source if self.kind == "reward" else "reward model"
