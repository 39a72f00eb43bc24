"""From the recipe's data and model to a reference and judged pairs: the stages that every run begins with."""

import datetime
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dpo_core.data.tokens.chat_template import template_in
from dpo_core.data.tokens.config import settled
from dpo_core.errors import RecipeError
from dpo_core.methods.reward import no_agreement
from tasks.promotion.champion import find_champion
from tasks.recipe.policies import is_external
from tasks.recipe.recipe import Recipe
from tasks.reports.run_warnings import too_few_prompts
from tasks.stages.base import Context, StageResult
from tasks.stages.data import load_data, sample_pairs, validate
from tasks.stages.models import import_model
from tasks.stages.prepare_sft import prepare_sft
from tasks.stages.same_tokens import require_same_tokens
from tasks.stages.train_reward import train_reward
from tasks.store.facts import GateFacts, LoadFacts, facts_of
from tasks.store.manifest import Manifest

log = logging.getLogger("dpo")

Keep = Callable[[StageResult], Manifest]
"""Enters what a stage came to under a name, and hands on its manifest."""


@dataclass(frozen=True)
class Prepared:
    """What training starts from."""

    reference: Manifest
    judged: Manifest
    """The rows that passed the gate, whose prompts are sampled and evaluated on."""
    pairs: Manifest
    """Pairs, or unpaired rows, that passed the gate."""
    recipe: Recipe
    """With the day that the chat template writes, where it writes one."""
    sampled: Manifest | None = None
    """Pairs as they were sampled, where the data are prompts."""
    models: Mapping[str, Manifest] = field(default_factory=dict)
    """Models of the registry or of earlier runs, by the name that policies give them."""

    def train_reward(self, context: Context, seed: int, label: str, keep: Keep) -> Manifest:
        """A reward model trained on the pairs."""
        labelled = context.labelled(label)
        settings = self.recipe.reward.model
        result = train_reward(labelled, self.reference, self.pairs, settings, self.recipe.tokens, seed)
        return keep(result)


def prepare(context: Context, recipe: Recipe, keep: Keep) -> Prepared:
    """Load, import, judge, fine-tune, and where the data are prompts sample pairs and judge those."""
    seed = recipe.seed
    loaded = keep(load_data(context, recipe.data))
    kind = facts_of(loaded, LoadFacts).kind
    _require_labels(recipe, kind)
    imported = import_model(context, recipe.model, recipe.tokens.max_length, recipe.precision)
    base = keep(imported)
    models = _from_elsewhere(context, recipe, base, keep)
    _require_comparable_champion(context, recipe, base)
    recipe = _dated(recipe, loaded, base)
    tokens = recipe.tokens
    judged = keep(validate(context, kind, loaded, base, recipe.gate, tokens))
    _require_answers(recipe, judged)

    reference = base
    if recipe.sft.enabled:
        given = None if kind == "prompts" else judged
        reference = keep(prepare_sft(context, base, given, recipe.sft, tokens, seed))
    pairs, sampled = judged, None
    if kind == "prompts":
        source = str(recipe.reward.source)
        drawn = sample_pairs(context, judged, reference, recipe.pairs, tokens, source, seed)
        sampled = keep(drawn)
        pairs = keep(validate(context, "pairs", sampled, base, recipe.gate, tokens))
    return Prepared(reference, judged, pairs, recipe, sampled, models)


def _from_elsewhere(context: Context, recipe: Recipe, base: Manifest, keep: Keep) -> dict[str, Manifest]:
    """The models from outside the recipe that policies name, which must read the tokens of this run."""
    models = {}
    for name in dict.fromkeys(m for node in recipe.nodes() for m in node.config.models if is_external(m)):
        config = recipe.model.model_copy(update={"name": name, "revision": None, "scratch": None})
        labelled = context.labelled(f" {name}")
        model = keep(import_model(labelled, config, recipe.tokens.max_length, recipe.precision))
        if not model.planned and not base.planned:
            require_same_tokens(
                context, base.path, model.path, name, "Name a model that was trained from the same base model"
            )
        models[name] = model
    return models


def _require_comparable_champion(context: Context, recipe: Recipe, base: Manifest) -> None:
    """Refuse a run whose candidate could not be held against the champion of its registered name."""
    if context.plan or base.planned or recipe.study is not None:
        return
    champion = find_champion(context.tracker, recipe.registered_name)
    if champion is not None:
        remedy = "Set registry.name to another name, under which this model has no champion yet"
        require_same_tokens(
            context, base.path, champion.manifest.path, f"the champion {champion.title}", remedy
        )


def _dated(recipe: Recipe, loaded: Manifest, base: Manifest) -> Recipe:
    """The recipe with the day on which the data was first read, if the chat template asks for the date: the
    tokens of a run must not change at midnight, nor those of its resume."""
    if base.planned or loaded.planned:
        return recipe
    day = datetime.date.fromisoformat(str(facts_of(loaded, LoadFacts).read_on))
    tokens = settled(recipe.tokens, template_in(base.path), day)
    return recipe.model_copy(update={"tokens": tokens})


def _require_answers(recipe: Recipe, judged: Manifest) -> None:
    """What would be missed only after the training: an interval needs two answers, SFT a desirable one."""
    facts = facts_of(judged, GateFacts)
    if facts.held_out_prompts == recipe.evaluate.samples_per_prompt == 1:
        raise RecipeError(
            "one held-out prompt and one sample of it give no interval to compare the policies by",
            "Set evaluate.samples_per_prompt to 2 or more, or hold out more prompts",
        )
    held_out = facts.held_out_prompts
    if held_out is not None and (few := too_few_prompts(recipe, held_out)):
        log.warning("%s", few)
    if recipe.margin_by_agreement and facts.with_agreement == 0:
        raise no_agreement()
    if facts.desirable == 0 and _sft_reads_answers(recipe):
        raise RecipeError(
            "no training row is labelled desirable, and SFT learns from the desirable answers",
            "Set sft.demonstrations or sft.enabled=false",
        )


def _sft_reads_answers(recipe: Recipe) -> bool:
    sft = recipe.sft
    return sft.enabled and sft.demonstrations is None and sft.made_demonstrations is None


def _require_labels(recipe: Recipe, kind: str) -> None:
    """What only the data can tell: whether they are of the kind that the recipe learns from.

    Prompts alone need a reward to label samples, and demonstrations; unpaired rows need an objective of their
    own, and a reward, because a reward model is trained on pairs.
    """
    if kind == "unpaired":
        for name, policy in recipe.policies.items():
            if policy.entry.data == "pairs":
                raise RecipeError(
                    f"the data are unpaired rows, and policy {name} learns from pairs",
                    f"Set policies.{name}.method to kto, or give rows with a chosen and a rejected answer",
                )
        if recipe.reward.source is None:
            raise RecipeError(
                "the data are unpaired rows, and without reward.source a reward model would be trained on "
                "pairs",
                "Set reward.source",
            )
        if recipe.trains_reward_model:
            raise RecipeError(
                "the data are unpaired rows, and a policy's reward is a model, which is trained on pairs",
                "Leave the policy's reward out",
            )
    if kind != "prompts":
        return
    if recipe.reward.source is None:
        raise RecipeError(
            "the data are prompts without pairs, and no reward labels samples", "Set reward.source"
        )
    if recipe.margin_by_agreement:  # nobody votes on sampled pairs
        raise no_agreement()
    if _sft_reads_answers(recipe):
        raise RecipeError(
            "the data have no chosen answers for SFT to learn from",
            "Set sft.demonstrations or sft.enabled=false",
        )
