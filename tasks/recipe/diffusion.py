"""Checks of recipes of diffusion models: what they need, and what only language models have."""

from collections.abc import Mapping
from typing import Any

from dpo_core.data.tokens.config import TokenConfig
from dpo_core.evaluation.config import EvaluateConfig, PromotionConfig, SuiteConfig
from dpo_core.evaluation.suite_names import OF_DENOISERS
from dpo_core.generation.config import SamplingConfig
from dpo_core.methods.pair_sampling import PairSamplingConfig
from dpo_core.methods.sft import SftConfig
from tasks.recipe.sections import CacheConfig

_USUAL: Mapping[str, SamplingConfig] = {
    "pairs": PairSamplingConfig().sampling,
    "evaluate": EvaluateConfig().sampling,
    "suites.settings": SuiteConfig().sampling,
}
_OF_TEXT = ("max_new_tokens", "temperature", "precision")
"""Fields of a sampling section that a diffusion model does not read."""


def refuse_diffusion(recipe: Any, samplings: Mapping[str, SamplingConfig]) -> None:
    """Refuse fields that only diffusion models read, in a recipe of a language model.

    Raises:
        ValueError: the first such field.
    """
    unread: dict[str, Any] = {"diffusion_sft": recipe.diffusion_sft, "model.denoiser": recipe.model.denoiser}
    for field, value in unread.items():
        if value is not None:
            raise ValueError(
                f"{field} has no effect, because no policy trains a diffusion model. Remove it, or set the "
                "policies' method to diffusion"
            )
    for place, sampling in samplings.items():
        if sampling.denoising_steps != _USUAL[place].denoising_steps:
            raise ValueError(f"{place}.sampling.denoising_steps has no effect on a language model. Remove it")


def check_diffusion(recipe: Any, samplings: Mapping[str, SamplingConfig]) -> None:
    """Refuse what a diffusion model has not: tokens, log-probs, answers in words.

    Args:
        samplings: by section of the recipe.

    Raises:
        ValueError: the first field that cannot be used, with its remedy.
    """
    if other := [name for name, policy in recipe.policies.items() if policy.entry.model != "denoiser"]:
        raise ValueError(
            f"policies.{other[0]} trains a language model, and others diffusion models. Make two recipes"
        )
    made = recipe.diffusion_sft
    if made is not None and (made.captions is None) == (made.made_scenes is None):
        raise ValueError("diffusion_sft needs one source: set captions (a file) or made_scenes (a number)")
    if recipe.reward.source is None:
        raise ValueError(
            "reward.source is needed: reward models read text, and diffusion models make images. Set it to "
            "scenes:graded, a function with a parameter images, or a server"
        )
    limit = PromotionConfig().max_kl
    usual: list[tuple[str, Any, list[Any], str]] = [
        ("sft", recipe.sft, [SftConfig(), SftConfig(enabled=False)], "Use diffusion_sft"),
        ("tokens", recipe.tokens, [TokenConfig()], "Remove it"),
        ("cache", recipe.cache, [CacheConfig()], "Remove it"),
        ("study", recipe.study, [None], "Make a recipe of each setting, and use dpo compare"),
        ("judge", recipe.judge, [None], "Remove it; suites compare images"),
        ("promotion.max_kl", recipe.promotion.max_kl, [None, limit], "Remove it; suites limit what may fall"),
    ]
    for field, value, values, remedy in usual:
        if value not in values:
            raise ValueError(
                f"{field} cannot be used, because diffusion models have no tokens and no log-probs. {remedy}"
            )
    if text := [name for name in recipe.suites.names if name not in OF_DENOISERS]:
        raise ValueError(
            f"suites.names: {text[0]} is of language models. Diffusion models run {', '.join(OF_DENOISERS)}"
        )
    suites, of_suites = recipe.suites.settings, ("precision", "token_budget", "beta", "chat")
    read: list[tuple[str, Any, Any, tuple[str, ...]]] = [
        (f"{place}.sampling", sampling, _USUAL[place], _OF_TEXT) for place, sampling in samplings.items()
    ]
    read.append(("evaluate", recipe.evaluate, EvaluateConfig(), ("pairs", "precision", "token_budget")))
    read.append(("suites.settings", suites, SuiteConfig(), of_suites))
    for place, section, usual_section, fields in read:
        for field in fields:
            if getattr(section, field) != getattr(usual_section, field):
                raise ValueError(f"{place}.{field} has no effect on a diffusion model. Remove it")
