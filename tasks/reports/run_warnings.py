"""Warnings before the training: answers that evaluation would cut, too few held-out prompts to promote, and
questions without the model's chat template."""

import numpy as np

from dpo_core.data.answers import AnswerStatistics
from tasks.recipe.recipe import Recipe
from tasks.reports.alarms import COMPLETE_SHARE, CUT, CUT_SHARE, cut_message


def answers_cut(recipe: Recipe, answers: AnswerStatistics | None) -> str:
    """A warning if answers as long as the data's would be cut; else empty."""
    limit = recipe.evaluate.sampling.max_new_tokens
    if answers is None or answers.complete < COMPLETE_SHARE:
        return ""
    cut = float(np.mean([tokens > limit for tokens in answers.tokens]))
    if cut < CUT_SHARE:
        return ""
    refused = " Otherwise the model will not be promoted." if CUT in recipe.promotion.alarms else ""
    return f"expected: {cut_message(cut, limit, answers.median)}{refused}"


def without_template(recipe: Recipe, note: str) -> str:
    """A note of `Tokenise.note_on` as a warning; empty for generated openings, which are to be continued."""
    return note if recipe.data.openings is None else ""


def too_few_prompts(recipe: Recipe, held_out: int) -> str:
    """A warning if too few prompts are held out to promote the model; else empty."""
    needed, most = recipe.promotion.min_prompts, recipe.evaluate.prompts
    if recipe.study is not None or min(held_out, most) >= needed:
        return ""
    if most < needed <= held_out:
        remedy = "raise evaluate.prompts"
    elif most < needed:
        remedy = "add data or raise data.eval_fraction, and raise evaluate.prompts"
    else:
        remedy = "add data, or raise data.eval_fraction"
    return (
        f"{min(held_out, most):,} held-out prompts will be compared, fewer than promotion.min_prompts "
        f"{needed:,}: the model will not be promoted. To change that, {remedy}."
    )
