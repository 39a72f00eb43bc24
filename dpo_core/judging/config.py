"""Settings of the judge: who says which of two answers is better."""

from typing import Literal

from pydantic import Field, model_validator

from dpo_core.config import Config
from dpo_core.errors import RecipeError
from dpo_core.judging.client import Endpoint
from dpo_core.judging.prompts import find_template


class JudgeConfig(Config):
    """Who says which of two answers is better."""

    kind: Literal["reward", "reward_model", "llm"] = "reward"
    """A known reward, a trained reward model, or a language model that is asked."""
    source: str = "sentiment"
    """Of a reward: what `reward.source` takes. Of a reward model: its folder."""
    endpoint: Endpoint | None = None
    """Where the language model is asked."""
    template: str = "dialogue"
    """The question to it: `summary`, `summary_strict`, `dialogue`, `harmless` or `instruction`."""
    both_orders: bool = True
    """Ask each comparison twice with the answers exchanged; else once, in an order drawn from the texts."""
    unusable: float = Field(0.2, ge=0, le=1)
    """Share of comparisons without a usable verdict above which the judge counts as broken."""

    @model_validator(mode="after")
    def _complete(self) -> "JudgeConfig":
        find_template(self.template)
        if (self.kind == "llm") != (self.endpoint is not None):
            raise RecipeError(
                f"the judge is of kind '{self.kind}' and has {'an' if self.endpoint else 'no'} endpoint",
                "Set judge.kind to llm, or leave judge.endpoint out"
                if self.endpoint
                else "Set judge.endpoint.base_url and judge.endpoint.model too",
            )
        return self

    @property
    def name(self) -> str:
        """As a table calls the judge."""
        if self.endpoint is not None:
            return self.endpoint.model
        return self.source if self.kind == "reward" else "reward model"
