"""The first stages of every run: load and check the data, import the model, make the reference and pairs."""

import datetime
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dpo_core.data.tokens.chat_template import template_in
from dpo_core.data.tokens.config import with_date
from dpo_core.errors import RecipeError
from dpo_core.methods.reward import no_agreement
from tasks.promotion.model_source import find_champion
from tasks.recipe.policies import is_external
from tasks.recipe.recipe import Recipe
from tasks.reports.run_warnings import too_few_prompts, without_template
from tasks.stages.base import Context, StageResult
from tasks.stages.data import load_data, sample_pairs, validate
from tasks.stages.models import import_model
from tasks.stages.prepare_denoiser import prepare_denoiser
from tasks.stages.prepare_sft import prepare_sft
from tasks.stages.same_tokens import require_same_tokens
from tasks.stages.train_reward import train_reward
from tasks.store.facts import GateFacts, LoadFacts, facts_of
from tasks.store.manifest import Manifest

log = logging.getLogger("dpo")

RecordResult = Callable[[StageResult], Manifest]
"""Records the result of a stage and returns its manifest."""


@dataclass(frozen=True)
class Prepared:
    """The artifacts that training starts from."""

    reference: Manifest
    judged: Manifest
    """The rows that passed the gate; policies sample and are evaluated on their prompts."""
    pairs: Manifest
    """Pairs, or unpaired rows, that passed the gate."""
    recipe: Recipe
    """The recipe with a fixed `tokens.date`, if the chat template writes the date."""
    sampled: Manifest | None = None
    """The sampled pairs, if the data are prompts."""
    models: Mapping[str, Manifest] = field(default_factory=dict)
    """Models of the registry or of earlier runs, by their names in the policies."""

    def train_reward(self, context: Context, seed: int, label: str, keep: RecordResult) -> Manifest:
        """Train a reward model on the pairs."""
        labelled = context.labelled(label)
        settings = self.recipe.reward.model
        result = train_reward(labelled, self.reference, self.pairs, settings, self.recipe.tokens, seed)
        return keep(result)


def prepare(context: Context, recipe: Recipe, keep: RecordResult) -> Prepared:
    """Run the first stages: load, import, data gate, SFT, and if the data are prompts, pair sampling."""
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
    if recipe.diffusion_sft is not None:
        reference = keep(prepare_denoiser(context, base, recipe.diffusion_sft, seed))
    if recipe.fine_tunes:
        demonstrations = None if kind == "prompts" else judged
        reference = keep(prepare_sft(context, base, demonstrations, recipe.sft, tokens, seed))
    pairs, sampled = judged, None
    if kind == "prompts":
        source = str(recipe.reward.source)
        sampled = keep(sample_pairs(context, judged, reference, recipe.pairs, tokens, source, seed))
        pairs = keep(validate(context, "pairs", sampled, base, recipe.gate, tokens))
    return Prepared(reference, judged, pairs, recipe, sampled, models)


def _from_elsewhere(
    context: Context, recipe: Recipe, base: Manifest, keep: RecordResult
) -> dict[str, Manifest]:
    """Import the registered or earlier models that policies name; they must have this run's tokenizer."""
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
    """Refuse a run whose candidate could not be compared with the champion of its registered name."""
    if context.plan or base.planned or recipe.study is not None:
        return
    champion = find_champion(context.tracker, recipe.registered_name)
    if champion is not None:
        remedy = "Set registry.name to another name, under which this model has no champion yet"
        require_same_tokens(
            context, base.path, champion.manifest.path, f"the champion {champion.title}", remedy
        )


def _dated(recipe: Recipe, loaded: Manifest, base: Manifest) -> Recipe:
    """The recipe with the day on which the data were first read, if the chat template writes the date. Tokens
    must not change at midnight or when a run is resumed."""
    if base.planned or loaded.planned:
        return recipe
    day = datetime.date.fromisoformat(str(facts_of(loaded, LoadFacts).read_on))
    tokens = with_date(recipe.tokens, template_in(base.path), day)
    return recipe.model_copy(update={"tokens": tokens})


def _require_answers(recipe: Recipe, judged: Manifest) -> None:
    """Refuse data that would fail only later: an interval needs two answers, SFT needs desirable ones."""
    facts = facts_of(judged, GateFacts)
    if facts.held_out_prompts == recipe.evaluate.samples_per_prompt == 1:
        raise RecipeError(
            "one held-out prompt with one sample gives no confidence interval to compare the policies",
            "Set evaluate.samples_per_prompt to 2 or more, or hold out more prompts",
        )
    held_out = facts.held_out_prompts
    if held_out is not None and (few := too_few_prompts(recipe, held_out)):
        log.warning("%s", few)
    if note := without_template(recipe, facts.written_as):
        log.warning("%s", note)
    if recipe.margin_by_agreement and facts.with_agreement == 0:
        raise no_agreement()
    if facts.desirable == 0 and _sft_reads_answers(recipe):
        raise RecipeError(
            "no training row is labelled desirable, but SFT learns from desirable answers",
            "Set sft.demonstrations or sft.enabled=false",
        )


def _sft_reads_answers(recipe: Recipe) -> bool:
    return recipe.fine_tunes and recipe.sft.reads_answers


def _require_labels(recipe: Recipe, kind: str) -> None:
    """Refuse data of a kind that the recipe cannot learn from.

    Prompts need a reward to label samples, and demonstrations for SFT. Unpaired rows need an objective for
    them, and a reward, because a reward model is trained on pairs.
    """
    if kind == "unpaired":
        for name, policy in recipe.policies.items():
            if policy.entry.data == "pairs":
                raise RecipeError(
                    f"the data are unpaired rows, but policy {name} learns from pairs",
                    f"Set policies.{name}.method to kto, or use rows with a chosen and a rejected answer",
                )
        if recipe.reward.source is None:
            raise RecipeError(
                "the data are unpaired rows, but without reward.source a reward model is trained on pairs",
                "Set reward.source",
            )
        learns = [name for name, policy in recipe.policies.items() if recipe.learns_from_model(policy)]
        if learns:
            raise RecipeError(
                f"the data are unpaired rows, but policies.{learns[0]}.reward is a model, which is trained "
                "on pairs",
                f"Remove policies.{learns[0]}.reward, so that the policy learns from reward.source",
            )
    if kind != "prompts":
        return
    if recipe.reward.source is None:
        raise RecipeError(
            "the data are prompts without pairs, but there is no reward to label samples", "Set reward.source"
        )
    if recipe.margin_by_agreement:  # sampled pairs have no votes
        raise no_agreement()
    if _sft_reads_answers(recipe):
        raise RecipeError(
            "the data have no chosen answers for SFT to learn from",
            "Set sft.demonstrations or sft.enabled=false",
        )
