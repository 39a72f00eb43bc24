"""The recipe's `data` section: sources, formats, mixtures, limits and the evaluation split."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from dpo_core.config import Config
from dpo_core.data.formats import ADAPTERS

if TYPE_CHECKING:
    Format = str
else:
    Format = Literal[tuple(ADAPTERS)]
Column = Literal[
    "prompt", "chosen", "rejected", "completion", "label", "system", "messages", "conversations", "history",
    "instruction", "input", "tools", "agreement", "margin", "answers", "answer", "score",
]  # fmt: skip
Pairing = Literal["best_worst", "all", "adjacent"]


class SourceConfig(Config):
    """One data set of a mixture."""

    path: str = Field(min_length=1)
    """A local file, a folder of files, or the name of a data set on the Hugging Face hub."""

    format: Literal["auto"] | Format = "auto"
    """Format of the rows; `auto` recognises it from the first rows."""

    split: str | None = Field(default=None, min_length=1)
    """The split to read from a hub data set, or from a folder whose files are named by splits."""

    columns: dict[Column, str] | None = Field(default=None, min_length=1)
    """The data's own column names, if they differ: {prompt: ask, chosen: good, …}."""

    limit: int | None = Field(default=None, ge=1)
    """Keep a seeded random sample of this many examples of the set. Empty: all."""

    weight: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Share of the mixture that comes from this set, relative to the other weights. If it is empty for all
    sets, the mixture has all their examples."""


class DataConfig(Config):
    """The sources of the examples, their format, and the evaluation split."""

    path: str | None = Field(default=None, min_length=1)
    """A local file, a folder of files, or the name of a data set on the Hugging Face hub."""

    mixture: list[SourceConfig] | None = Field(default=None, min_length=1)
    """Several sets in place of `path`, each with its own path, format, split, columns, limit and weight. With
    weights, the mixture is as large as possible without repeating an example."""

    format: Literal["auto"] | Format = "auto"
    """Format of the rows; `auto` recognises it from the first rows."""

    split: str | None = Field(default=None, min_length=1)
    """The split to read from a hub data set, or a folder whose files are named by splits. Empty: train."""

    columns: dict[Column, str] | None = Field(default=None, min_length=1)
    """The data's own column names, if they differ: {prompt: ask, chosen: good, …}."""

    pairs: Pairing = "best_worst"
    """The pairs made from a ranked list of answers: best with worst, all pairs, or neighbours."""

    limit: int | None = Field(default=None, ge=2)
    """Keep a seeded random sample of this many examples, in file order. Empty: all."""

    eval_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the distinct prompts that are held out for evaluation."""

    eval_path: str | None = Field(default=None, min_length=1)
    """Examples for evaluation, in place of a share of `path`; `format` applies to both."""

    eval_split: str | None = Field(default=None, min_length=1)
    """The split to read from `eval_path`. Empty: a folder's test (or validation) split, the hub's train."""

    openings: int | None = Field(default=None, ge=2)
    """Number of generated review openings to use as prompts in place of a `path`."""

    scenes: int | None = Field(default=None, ge=2, exclude_if=lambda count: count is None)
    """Number of generated prompts of each category, for images of the world of scenes, in place of a path."""

    solid_scenes: bool = Field(default=False, exclude_if=lambda chosen: not chosen)
    """The generated prompts of solid scenes, for a diffusion model, in place of a path; those of the suite
    scenes_solid are held out."""

    held_out_content: bool = Field(default=False, exclude_if=lambda held_out: not held_out)
    """With `scenes`: no prompt names a ring, purple or four of a kind, which the suites do name."""

    images: str | None = Field(default=None, min_length=1, exclude_if=lambda folder: folder is None)
    """Folder in which the paths of images begin (empty: that of the data), and in which images that the rows
    hold are kept, by their digests."""

    seed: int = Field(default=0, ge=0)
    """Seed of samples, of the split and of the generated prompts."""

    @model_validator(mode="after")
    def _one_source(self) -> "DataConfig":
        known = ("path", "openings", "mixture", "scenes", "solid_scenes")
        sources = [name for name in known if getattr(self, name) not in (None, False)]
        if len(sources) != 1:
            state = {0: "none is set", 2: "two are set"}.get(len(sources), "more are set")
            raise ValueError(
                "set exactly one of data.path (a file, a folder or a hub name), data.mixture (several of "
                f"them) and data.openings or data.scenes (a number of generated prompts) or "
                f"data.solid_scenes; {state}"
            )
        unread = {
            "path": (),
            "mixture": ("split",) if self.eval_path is not None else ("format", "split", "columns"),
            "openings": ("format", "split", "columns", "limit", "pairs"),
            "scenes": ("format", "split", "columns", "limit", "pairs"),
            "solid_scenes": (
                "format",
                "split",
                "columns",
                "limit",
                "pairs",
                "eval_path",
                "eval_fraction",
                "seed",
            ),
        }[sources[0]]
        if changed := [name for name in unread if self._changed(name)]:
            names = ", ".join(f"data.{name}" for name in changed)
            why = (
                f"there is no data.path, only data.{sources[0]}"
                if sources[0] in ("openings", "scenes", "solid_scenes")
                else "each set of data.mixture has its own"
            )
            have, them = ("has", "it") if len(changed) == 1 else ("have", "them")
            raise ValueError(f"{names} {have} no effect, because {why}. Remove {them}")
        if self.eval_path is not None and self._changed("eval_fraction"):
            raise ValueError(
                "data.eval_fraction has no effect, because data.eval_path gives the evaluation set. Remove "
                "one of the two"
            )
        if self.eval_split is not None and self.eval_path is None:
            raise ValueError(
                "data.eval_split has no effect, because there is no data.eval_path. Set that, or remove "
                "data.eval_split"
            )
        if self.held_out_content and self.scenes is None:
            raise ValueError(
                "data.held_out_content has no effect, because there are no data.scenes. Remove it"
            )
        weighted = [source.weight is not None for source in self.mixture or ()]
        if any(weighted) and not all(weighted):
            raise ValueError("data.mixture: set a weight for all sets, or for none")
        return self

    def _changed(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    @property
    def paths(self) -> list[str]:
        """All files, folders and hub names that are read, for training or evaluation."""
        return [path for _, path in self.named_paths]

    @property
    def named_paths(self) -> list[tuple[str, str]]:
        """The same, each with its field in the recipe."""
        mixed = [(f"data.mixture.{index}.path", one.path) for index, one in enumerate(self.mixture or ())]
        named = [("data.path", self.path), *mixed, ("data.eval_path", self.eval_path)]
        return [(field, path) for field, path in named if path is not None]
