"""Describes in words what a run trained: base model, data, objective, steps and reward."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from dpo_core.models.folder import is_denoiser
from dpo_core.objectives import get
from tasks.recipe.policies import REFERENCE, PolicyFields
from tasks.recipe.recipe import Recipe
from tasks.reports.run_report import PolicyAbout, TrainingDescription, lineage
from tasks.store.facts import GateFacts, ImportFacts, TrainingFacts, facts_of
from tasks.store.manifest import Manifest


@dataclass(frozen=True)
class RunData:
    """The data and the base model of a run."""

    loaded: Manifest
    """The data as read."""
    base: Manifest
    """The imported model."""
    prompts: Manifest
    """The rows that passed the gate; the held-out prompts are taken from them."""
    rows: Manifest
    """The training rows: the same rows, or pairs sampled from their prompts."""
    kind: Literal["pairs", "unpaired"]
    """Kind of the training rows."""

    @property
    def sampled(self) -> bool:
        """Whether the pairs were sampled."""
        return self.rows is not self.prompts

    @property
    def gates(self) -> list[Manifest]:
        """The data sets that passed a gate."""
        return [self.prompts, self.rows] if self.sampled else [self.rows]

    def read_by(self, policy: PolicyFields) -> Manifest:
        """The data of a policy: pairs or unpaired rows, or the rows whose prompts it samples."""
        return self.prompts if policy.entry.scored else self.rows


def describe_candidate(
    recipe: Recipe, data: RunData, model: Manifest, policies: Mapping[str, PolicyAbout]
) -> TrainingDescription:
    """The description of a run's candidate and its training.

    Args:
        model: the candidate's artifact.
        policies: descriptions of all policies.
    """
    candidate = recipe.policies[recipe.candidate_name]
    columns = ["split", "prompt", "chat"]
    frame = pd.read_parquet(data.read_by(candidate).path / "data.parquet", columns=columns)
    unit = "pairs" if data.kind == "pairs" else "rows"
    if candidate.entry.scored:
        frame, unit = frame.drop_duplicates(columns), "prompts"
    used = int((frame["split"] == "train").sum())
    used = min(used, getattr(candidate, "limit", None) or used)
    counts = [f"{used:,} {unit} trained on, {(frame['split'] == 'eval').sum():,} held out"]
    if not candidate.entry.scored:
        counts[0] += _sampled(recipe, data)
        counts.append(f"{_count(data.prompts):,} held-out prompts")
    ancestors = lineage(policies, recipe.candidate_name)

    def listed(chosen: Iterable[str]) -> str:
        return "; ".join(", ".join(_named(name, recipe.policies[name])) for name in chosen)

    return TrainingDescription(
        base_model=_model(recipe, data.base),
        started_from=facts_of(data.base, ImportFacts).started_from,
        data="; ".join([_source(recipe), *counts]),
        rows_trained=used,
        reference=_reference(recipe),
        objective=policy_words(candidate),
        training=f"{training_words(candidate, model)}, seed {recipe.seed}",
        reward=_reward(recipe),
        before=listed(name for name in ancestors if name in policies),
        baselines=listed(n for n in policies if n not in (recipe.candidate_name, *ancestors)),
    )


def _named(name: str, policy: PolicyFields) -> list[str]:
    """The description of a policy, without repeating its name."""
    words = policy_words(policy)
    return [name, *([] if words.casefold() == name.casefold() else [words]), training_words(policy)]


def describe_policies(recipe: Recipe) -> dict[str, PolicyAbout]:
    """The description of each policy, in the recipe's order."""
    nodes = {node.policy: node for node in recipe.nodes()}
    return {
        name: PolicyAbout(
            method=policy.method,
            words=settings_words(policy),
            objective=objective_name(policy),
            reward=_learned_from(recipe, policy),
            start=policy.start,
            reference=policy.reference,
            stage=policy.entry.stage + nodes[name].label,
            unusual=_unusual(policy),
        )
        for name, policy in recipe.policies.items()
    }


def _learned_from(recipe: Recipe, policy: PolicyFields) -> Literal["source", "model"] | None:
    if not policy.entry.scored:
        return None
    return "model" if recipe.learns_from_model(policy) else "source"


def _unusual(policy: PolicyFields) -> str:
    terms = getattr(policy, "terms", [])
    words = [note for term in terms for note in get(term.name).unusual(term.parameters)]
    return f"{'; '.join(words)}." if words else ""


def policy_words(policy: PolicyFields) -> str:
    """Method or objective; start and reference if they differ from the run's reference."""
    parts = [settings_words(policy)]
    if policy.start != REFERENCE:
        parts.append(f"starts from {policy.start}")
    if policy.reference != REFERENCE:
        parts.append(f"reference {policy.reference}")
    return "; ".join(parts)


def settings_words(policy: PolicyFields) -> str:
    """The objective with all parameters, or the method if it has no objective."""
    return objective_words(policy) if hasattr(policy, "terms") else policy.method


def objective_words(config: Any) -> str:
    """`simpo, beta 2, gamma_beta_ratio 0.5`; the terms of a sum with their weights."""
    terms = [
        ", ".join([term.name, *(f"{name} {value:g}" for name, value in term.parameters.items())])
        for term in config.terms
    ]
    if len(terms) > 1:
        terms = [f"{term.weight:g} × ({words})" for term, words in zip(config.terms, terms, strict=True)]
    weighting = getattr(config, "weighting", "none")
    extras = [] if weighting == "none" else [f"weighting {weighting}"]
    if kappa := getattr(config, "kappa", None):
        extras.append(f"kappa {kappa:g}")
    if sync := getattr(config, "reference_sync", None):
        extras.append(f"reference moved by {sync.mix:g} every {sync.every} steps")
    return "; ".join([" + ".join(terms), *extras])


def objective_name(config: Any) -> str:
    """`simpo`, or `dpo + sft` for a sum; empty if the method has no objective."""
    return " + ".join(term.name for term in getattr(config, "terms", []))


def vocabulary_size(model: Manifest) -> int | None:
    """Size of the model's vocabulary; None if its configuration has none."""
    if is_denoiser(model.path):
        return None
    facts: dict[str, Any] = json.loads((model.path / "config.json").read_text())
    size = facts.get("vocab_size") or facts.get("text_config", {}).get("vocab_size")
    return int(size) if size else None


def learned_from_reward(recipe: Recipe, data: RunData) -> list[str] | None:
    """The policies that learned from the reward used for evaluation; None if that is a reward model."""
    if recipe.reward.source is None:
        return None

    def learned(name: str) -> bool:
        policy = recipe.policies[name]
        own = data.sampled if not policy.entry.scored else not recipe.learns_from_model(policy)
        return own or any(learned(model) for model in policy.models if model in recipe.policies)

    return [name for name in recipe.policies if learned(name)]


def _model(recipe: Recipe, base: Manifest) -> str:
    origin = facts_of(base, ImportFacts).started_from
    parts = [recipe.model.name + (f" at {recipe.model.revision}" if recipe.model.revision else "")]
    if recipe.model.denoiser:
        parts = ["a new diffusion model of solid scenes with random weights"]
    if origin is not None:
        parts = [origin.sentence]
    if recipe.model.scratch:
        parts[0] = f"a new model with random weights, architecture and tokenizer of {parts[0]}"
    if base.parameters:
        parts.append(f"{base.parameters:,} parameters")
    return ", ".join(parts)


def _source(recipe: Recipe) -> str:
    if recipe.data.openings:
        return f"{recipe.data.openings:,} self-made review openings"
    if recipe.data.solid_scenes:
        return "the prompts of solid scenes"
    if recipe.data.scenes:
        return f"{recipe.data.scenes:,} self-made prompts of each category of the world of scenes"
    return ", ".join(_paths(recipe.data.model_dump(mode="json")))


def _paths(settings: Any) -> list[str]:
    """All paths of files or data sets in nested settings."""
    if isinstance(settings, list):
        return [path for inner in settings for path in _paths(inner)]
    if not isinstance(settings, dict):
        return []
    own = [settings["path"]] if settings.get("path") else []
    return own + [path for inner in settings.values() for path in _paths(inner)]


def _sampled(recipe: Recipe, data: RunData) -> str:
    if not data.sampled:
        return ""
    return f", sampled from the reference and labelled by {recipe.reward.source}"


def _count(rows: Manifest) -> int:
    return facts_of(rows, GateFacts).held_out_prompts or 0


def _reference(recipe: Recipe) -> str:
    made = recipe.diffusion_sft
    if made is not None:
        images = made.captions or f"{made.made_scenes:,} self-made captioned images of solid scenes"
        return f"the base model trained on {images}, learning rate {made.optim.learning_rate:g}"
    if not recipe.fine_tunes:
        return "the base model"
    sft = recipe.sft
    shown = "the chosen answers"
    if sft.made_scenes is not None:
        shown = f"{sft.made_scenes:,} self-made captioned scenes"
    elif sft.made_demonstrations is not None:
        shown = f"{sft.made_demonstrations:,} self-made demonstrations"
    elif sft.demonstrations is not None:
        shown = sft.demonstrations
    return f"the base model after SFT on {shown}, learning rate {sft.optim.learning_rate:g}"


def training_words(policy: PolicyFields, model: Manifest | None = None) -> str:
    """Steps, batch size, learning rate, and whether all weights or LoRA weights are trained."""
    settings = policy.settings
    if policy.entry.scored:
        size = f"{settings.iterations} rounds of {settings.episodes} episodes"
    else:
        size = f"batches of {settings.batch_size:,}"
    steps = facts_of(model, TrainingFacts).steps if model else None
    parts = [
        *([f"{steps:,} steps"] if steps is not None else []),
        size,
        f"learning rate {settings.optim.learning_rate:g}",
    ]
    if hasattr(settings, "lora"):
        parts.append("LoRA weights" if settings.lora else "all weights")
    return ", ".join(parts)


def _reward(recipe: Recipe) -> str:
    if recipe.reward.source is None:
        return "a reward model, trained on the same pairs"
    learned = [name for name, policy in recipe.policies.items() if recipe.learns_from_model(policy)]
    if learned:
        return (
            f"{recipe.reward.source}; {', '.join(learned)} learned from a reward model trained on the pairs"
        )
    return recipe.reward.source
