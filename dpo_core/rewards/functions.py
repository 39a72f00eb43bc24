"""Loads the reward function that a recipe names (built-in, Python or HTTP) and checks its scores.

A reward function takes N prompts and N completions and returns N finite numbers; larger is better. One with a
parameter named `images` gets PIL images in place of the completions' texts.
"""

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from dpo_core.errors import DpoError, RecipeError, StageFailed
from dpo_core.images.rewards import KINDS, PREFIX, REVISIONS, Kind, SceneReward
from dpo_core.rewards.ensemble import is_ensemble, parts
from dpo_core.rewards.http import HttpImageReward, HttpReward, is_url
from dpo_core.system import digest_file, digest_text

_FORMS = "Write 'sentiment', 'scenes:exact', 'package.module:callable', 'path/to/file.py:callable' or 'http(s)://host:port/path'."


@runtime_checkable
class RewardFunction(Protocol):
    """The interface of a reward function."""

    name: str

    def __call__(
        self, prompts: list[str], completions: list[str], metadata: list[str] | None = None
    ) -> list[float]:
        """One finite number per completion, in order.

        Args:
            completions: their texts; of a function that sees images, PIL images.
            metadata: what the data say of each prompt, as JSON; "" for nothing. None: nothing of any.
        """
        ...


class SentimentReward:
    """The VADER compound score of the completion alone, in [-1, 1]; 0 for text without any known word.

    It is a lexicon, not a model: deterministic, fast, and easy to exploit. Hutto and Gilbert, ICWSM 2014.
    """

    name = "sentiment"

    def __init__(self) -> None:
        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(
        self, prompts: list[str], completions: list[str], metadata: list[str] | None = None
    ) -> list[float]:
        return [float(self._analyzer.polarity_scores(text)["compound"]) for text in completions]


class CheckedReward:
    """A reward function whose scores are checked before they are used."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function = function
        self.name = name
        self._reads_metadata = "metadata" in _parameters(function)
        self.sees_images = "images" in _parameters(function)

    def __call__(
        self, prompts: list[str], completions: list[Any], metadata: list[str] | None = None
    ) -> list[float]:
        """One finite float per completion; `metadata` goes to functions that have a parameter of that name.

        Args:
            completions: their texts; PIL images if the function `sees_images`.

        Raises:
            StageFailed: the function raised, returned another number of scores, or a score that is not a
                finite number; the row (counted from 0) is named.
            ValueError: prompts and completions differ in number.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts for {len(completions)} completions")
        if not completions:
            return []
        if self.sees_images and isinstance(completions[0], str):
            raise StageFailed(
                f"the reward '{self.name}' sees images, and the completions are text",
                "Use it with a model that makes images, or rename its parameter to completions",
            )
        try:
            # Pass copies, so that a function that modifies its arguments does not modify the caller's lists.
            more = [list(metadata or [""] * len(prompts))] if self._reads_metadata else []
            scores = list(self.function(list(prompts), list(completions), *more))
        except DpoError:  # already has a remedy
            raise
        except Exception as error:
            what = "images" if self.sees_images else "completions"
            raise StageFailed(
                f"the reward '{self.name}' failed on {len(completions)} completions: "
                f"{type(error).__name__}: {error}",
                f"It must take (prompts, {what}) and return a list of numbers.",
            ) from error
        if len(scores) != len(completions):
            raise StageFailed(
                f"the reward '{self.name}' returned {len(scores)} scores for {len(completions)} completions",
                "Return exactly one score per completion, in order.",
            )
        return [self._number(score, row, completions[row]) for row, score in enumerate(scores)]

    def _number(self, score: Any, row: int, completion: Any) -> float:
        try:
            # float("0.5") would work, but a reward that returns text is probably broken.
            number = math.nan if isinstance(score, str) else float(score)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise StageFailed(
                f"the reward '{self.name}' returned {score!r} for row {row} (completion "
                f"{completion[:60] if isinstance(completion, str) else completion!r})",
                "Return a finite number for every completion, including empty ones.",
            )
        return number


def load_reward(spec: str, *, images: bool = False) -> CheckedReward:
    """The reward function that a recipe names; its scores are checked on every call.

    Args:
        spec: "sentiment", "scenes:exact", "package.module:callable", "path/to/file.py:callable" (relative to
            the current folder) or the address of a server (see `http`). A class is instantiated without
            arguments.
        images: the completions are images, which a server then gets.

    Raises:
        RecipeError: nothing of that name can be loaded, or it is not callable.
    """
    if is_ensemble(spec):
        raise RecipeError(
            f"'{spec}' is an ensemble, which orders samples of one prompt and rates no single answer",
            "Name one reward here",
        )
    if spec == SentimentReward.name:
        return CheckedReward(SentimentReward(), spec)
    if is_url(spec):
        return CheckedReward(HttpImageReward(spec) if images else HttpReward(spec), spec)
    if seen := scene_kind(spec):
        return CheckedReward(SceneReward(seen), spec)
    place, colon, attribute = spec.rpartition(":")
    if not (colon and place and attribute):
        raise RecipeError(f"'{spec}' does not name a reward function", _FORMS)
    module = _load_file(Path(place), spec) if place.endswith(".py") else _load_module(place, spec)
    if not hasattr(module, attribute):
        raise RecipeError(f"the reward '{spec}' does not exist: '{place}' has no '{attribute}'", _FORMS)
    function = getattr(module, attribute)
    if inspect.isclass(function):
        try:
            function = function()
        except Exception as error:
            raise _cannot_load(spec, error) from error
    if not callable(function):
        kind = type(function).__name__
        raise RecipeError(f"the reward '{spec}' is not callable: it is of type {kind}", _FORMS)
    name = getattr(function, "name", None)
    return CheckedReward(function, name if isinstance(name, str) else attribute)


def scene_kind(spec: str) -> Kind | None:
    """The kind of a reward of scenes, from its name in a recipe; None for another reward."""
    return next((kind for kind in KINDS if spec == PREFIX + kind), None)


def _parameters(function: Callable[..., Any]) -> Collection[str]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # of a callable written in C
        return ()


def is_reward_model(source: str) -> bool:
    """Whether a reward's source is the folder of a trained reward model."""
    return Path(source, "reward.json").is_file()


def reward_identity(spec: str | None) -> str | None:
    """A reward's identity in a stage's key: its spec and the digest of the file that defines it.

    An edited reward is a different reward. Changes in modules that the file imports are not noticed. A server
    is identified by its address, so a changed server needs a new address (`/v2`).
    """
    if spec and is_ensemble(spec):
        return " + ".join(f"{part.weight:g} * {reward_identity(part.source)}" for part in parts(spec))
    if spec is None or spec == SentimentReward.name or is_url(spec):
        return spec
    if kind := scene_kind(spec):
        return f"{spec} {REVISIONS[kind]}" if kind in REVISIONS else spec
    place = spec.rpartition(":")[0]
    if not place.endswith(".py"):
        module = importlib.util.find_spec(place)
        place = module.origin or "" if module else ""
    path = Path(place).expanduser()
    content = digest_file(path) if path.is_file() else "no source"
    return f"{spec.rpartition(':')[2]} of {content}"


def check_reward(spec: str, *, images: bool = False) -> None:
    """Load a reward and score two completions with it, before anything is trained: a text and an empty one,
    or two images. Of an ensemble, each of its rewards.

    Args:
        images: the completions of the model are images.

    Raises:
        RecipeError: it cannot be loaded, or its scores are not usable.
    """
    for part in parts(spec):
        if not scene_kind(part.source):
            _try_out(part.source, images=images)


def _try_out(spec: str, *, images: bool) -> None:
    # Report an unreachable server within seconds; in a run it has more time to recover.
    kind = HttpImageReward if images else HttpReward
    reward = CheckedReward(kind(spec, retries=1), spec) if is_url(spec) else load_reward(spec)
    completions: list[Any] = [" long and good.", ""]
    if reward.sees_images and images:
        from PIL import Image  # noqa: PLC0415 - only runs with images need it

        completions = [Image.new("RGB", (64, 64), color) for color in ("red", "white")]
    try:
        reward(["The film was", "The film was"], completions)
    except StageFailed as error:
        raise RecipeError(f"the check of reward.source failed: {error.problem}", error.remedy) from error


def _load_module(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a user's module may fail in any way while it is imported
        raise _cannot_load(spec, error) from error


def _load_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        raise RecipeError(f"the reward '{spec}' does not exist: there is no file '{path}'", _FORMS)
    # A name per path: two files called reward.py must not replace each other.
    name = f"dpo_reward_{digest_text(str(path.resolve()))[:16]}"
    location = importlib.util.spec_from_file_location(name, path)
    assert location is not None, "a path that ends in .py always has a loader"
    assert location.loader is not None
    module = importlib.util.module_from_spec(location)
    sys.modules[name] = module  # dataclasses and pickle look the module up while and after it runs
    try:
        location.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _cannot_load(spec, error) from error
    return module


def _cannot_load(spec: str, error: Exception) -> RecipeError:
    return RecipeError(f"the reward '{spec}' cannot be loaded: {type(error).__name__}: {error}", _FORMS)
