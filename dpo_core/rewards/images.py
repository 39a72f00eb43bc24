"""Rewards of images that a diffusion model drew."""

from collections.abc import Mapping, Sequence

from dpo_core.errors import RecipeError
from dpo_core.images.codec import as_images, read_pixels
from dpo_core.ranks import Ranks
from dpo_core.rewards.ensemble import combine, is_ensemble, parts
from dpo_core.rewards.functions import CheckedReward, load_reward, scene_kind


def image_rewards(source: str) -> list[CheckedReward]:
    """The rewards that a recipe names, each of which sees images.

    Raises:
        RecipeError: one cannot be loaded, or reads texts.
    """
    functions = [load_reward(part.source, images=True) for part in parts(source)]
    for part, function in zip(parts(source), functions, strict=True):
        if not (function.sees_images or scene_kind(part.source)):
            raise RecipeError(
                f"the reward {part.source} reads texts, and a diffusion model makes images",
                "Name a reward of images in reward.source: scenes:graded, a function with a parameter "
                "images, or a server",
            )
    return functions


def score_images(
    source: str, prompts: Sequence[str], files: Sequence[bytes], metadata: Mapping[str, str], ranks: Ranks
) -> list[float]:
    """The reward of each PNG file; one rank computes all.

    Args:
        prompts: of each image; an ensemble compares those of a prompt, which stand together.
        metadata: what the data say of each prompt, by its text.
    """
    functions, weights = image_rewards(source), [part.weight for part in parts(source)]

    def compute(_: int) -> list[float]:
        told = [metadata.get(prompt, "") for prompt in prompts] if metadata else None
        images = as_images(read_pixels(files))
        columns = [function(list(prompts), images, told) for function in functions]
        return combine(columns, weights, prompts) if is_ensemble(source) else columns[0]

    rewards: list[float]
    (rewards,) = ranks.map("rewards", [len(files)], compute)
    return rewards
