"""What the recipe says about the data."""

from typing import Literal

from pydantic import Field, model_validator

from dpo_core.config import Config

Format = Literal["hh", "prompt-pairs", "sharegpt", "pandalm", "stackexchange", "kto", "prompts"]


class DataConfig(Config):
    """Where the examples come from, how they are read, and which of them are held out."""

    path: str | None = Field(default=None, min_length=1)
    """A local file, a folder of files, or the name of a data set on the Hugging Face hub."""

    format: Literal["auto"] | Format = "auto"
    """How a row is written; `auto` recognises it from the first rows."""

    split: str = Field(default="train", min_length=1)
    """Which split of a hub data set is read; local files have none."""

    limit: int | None = Field(default=None, ge=2)
    """Keep a seeded random sample of this many examples, in file order; empty keeps all."""

    eval_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the distinct prompts that is held out for evaluation."""

    eval_path: str | None = Field(default=None, min_length=1)
    """Examples for evaluation, in place of a share of `path`; same format setting as `path`."""

    openings: int | None = Field(default=None, ge=2)
    """How many self-made review openings to use as prompts when there is no `path`."""

    seed: int = Field(default=0, ge=0)
    """Seed of the sample, of the split and of the self-made openings."""

    @model_validator(mode="after")
    def _one_source(self) -> "DataConfig":
        if (self.path is None) == (self.openings is None):
            given = "both are" if self.path is not None else "neither is"
            raise ValueError(
                f"{given} set: give data.path (a file, a folder or a hub name), "
                "or data.openings (a number of self-made prompts), exactly one of the two"
            )
        if self.path is None:
            unread = [name for name in ("format", "split", "limit") if self._changed(name)]
            if unread:
                names = ", ".join(f"data.{name}" for name in unread)
                raise ValueError(f"{names} would not be read: there is no data.path, only data.openings")
        if self.eval_path is not None and self._changed("eval_fraction"):
            raise ValueError("data.eval_fraction would not be read: data.eval_path gives the evaluation set")
        return self

    def _changed(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)
