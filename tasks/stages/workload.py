"""What the estimates of stages read: the model's shape, its tokenizer, and the rows of the run to come.

Lengths come from the real rows and the real tokenizer where there are rows; completions that are still to be
sampled count with their most tokens, and the plan says so.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd

from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.estimates.estimate import CAPPED, Examples, Inputs, Work, read, unknown
from dpo_core.examples.unpaired import unpaired_examples
from dpo_core.scoring import flops as cost
from dpo_core.scoring.document import Document
from tasks.recipe.policies import PolicyFields
from tasks.recipe.recipe import Recipe
from tasks.recipe.study import Node

SAMPLED_ROWS = 2000
"""Rows that are tokenised; of larger sets this many stand for all."""


@dataclass(frozen=True)
class Workload:
    """A run to come, as far as it is known."""

    recipe: Recipe
    config: Any
    """Configuration of the model."""
    layout: str
    """`packed: why`, or `padded: why`."""
    tokenise: Tokenise
    kind: Literal["pairs", "unpaired", "prompts"]
    """Of the data."""
    judged: pd.DataFrame
    """Rows of the data that passed the gate; while that has not run, those without a fault."""
    sampled: pd.DataFrame | None = None
    """Pairs that were sampled after the data's prompts and passed the gate; None while there are none."""

    @cached_property
    def shape(self) -> cost.Shape:
        """Of the model."""
        from dpo_core.scoring.model_shape import shape_of_config

        return shape_of_config(self.config)

    @cached_property
    def nodes(self) -> dict[str, Node]:
        """The policies to train, by the label of their stages."""
        return {node.label: node for node in self.recipe.nodes()}

    def inputs(self, policy: PolicyFields | None = None) -> Inputs:
        """What the estimate of a training reads."""
        return Inputs(
            shape=self.shape,
            examples=self.examples,
            packed=self.layout.startswith("packed"),
            seed=self.recipe.seed,
            new_tokens=self.recipe.evaluate.sampling.max_new_tokens,
            learned_reward=policy is not None and self.recipe.learns_from_model(policy),
        )

    def examples(self, data: str, limit: int | None = None) -> Examples:
        """The training examples of a kind of data, at most `limit` rows of them.

        Args:
            data: pairs, unpaired (pairs are taken apart), or prompts with a completion of the most tokens.
        """
        if data == "prompts":
            new = self.recipe.evaluate.sampling.max_new_tokens
            prompts, count = self.prompts("train", new, distinct=True)
            return Examples([Document(p, (unknown(new),)) for p in prompts], count)
        if self.kind == "unpaired":
            rows = self.judged[self.judged["split"] == "train"]
            kept, _ = unpaired_examples(self.tokenise, some(rows).to_dict("records"))
            documents = [Document(e.sequence.prompt, (e.sequence.completion,)) for e in kept]
            return Examples(documents, _usable(rows, len(kept))).limited(limit)
        pairs = self.pairs["train"].limited(limit)
        if data == "pairs":
            return pairs
        sides = [Document(d.prompt, (side,)) for d in pairs.documents for side in d.branches]
        return replace(pairs, documents=sides, count=2 * pairs.count)

    @cached_property
    def pairs(self) -> dict[str, Examples]:
        """The pairs of both sides of the split, train and eval; none of unpaired rows."""
        return {side: self._pairs(side) for side in ("train", "eval")}

    def _pairs(self, side: str) -> Examples:
        if self.kind == "unpaired":
            return Examples([], 0)
        frame = self.judged if self.kind == "pairs" else self.sampled
        if frame is None:
            return self._pairs_to_come(side)
        rows = frame[frame["split"] == side]
        kept, _ = self.tokenise.pairs(some(rows).to_dict("records"))
        return Examples([Document.of(p.chosen, p.rejected) for p in kept], _usable(rows, len(kept)))

    def _pairs_to_come(self, side: str) -> Examples:
        config = self.recipe.pairs
        prompts, count = self.prompts(side, config.sampling.max_new_tokens)
        drawn = config.samples_per_prompt
        each = drawn * (drawn - 1) // 2 if config.pairing == "all" else 1
        documents = [Document(p, (unknown(config.sampling.max_new_tokens),) * 2) for p in prompts]
        note = f"pairs still to be sampled: at most {each} a prompt, each answer of the most tokens"
        return Examples(documents, count * each, note)

    def prompts(self, side: str | None, new: int, distinct: bool = False) -> tuple[list[Any], int]:
        """Ids of (some of) the prompts of a side that leave room for `new` tokens, and how many there are."""
        rows = self.judged if side is None else self.judged[self.judged["split"] == side]
        if distinct:
            rows = rows.drop_duplicates(["prompt", "chat"])
        prompts = [self.tokenise.prompt_of(row, new) for row in some(rows).to_dict("records")]
        kept = [ids for ids in prompts if ids]
        return kept, _usable(rows, len(kept))

    def drawn(self, side: str | None, new: int, each: int, most: int | None = None) -> Work:
        """Sampling `each` completions of `new` tokens after every prompt of a side, or `most` of them."""
        prompts, count = self.prompts(side, new, distinct=most is not None)
        count = min(count, most or count) * each
        lengths = [len(p) for p in prompts]
        flops = cost.generation(self.shape, lengths, new) / max(len(lengths), 1)
        tokens = float(np.mean(lengths)) + new
        return Work(count * tokens, count * flops, note=CAPPED)

    def evaluated(self, policies: int) -> Work:
        """An evaluation of so many policies, the reference among them.

        Each samples and reads its samples, and the reference reads them too.
        """
        config, new = self.recipe.evaluate, self.recipe.evaluate.sampling.max_new_tokens
        drawn = self.drawn("eval", new, config.samples_per_prompt, config.prompts)
        tokens, reading = read(self.shape, self.pairs["eval"].limited(config.pairs))
        again = drawn.tokens * cost.forward(self.shape, 1, 0, 0)
        return replace(
            drawn,
            tokens=policies * (drawn.tokens + tokens),
            flops=policies * (drawn.flops + reading) + (2 * policies - 1) * again,
            precision=config.sampling.precision,
        )


def some(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, or a seeded choice that stands for all of them."""
    return rows if len(rows) <= SAMPLED_ROWS else rows.sample(SAMPLED_ROWS, random_state=0)


def _usable(rows: pd.DataFrame, kept: int) -> int:
    """How many of all rows can be used, as `kept` of those that were tokenised could."""
    return round(len(rows) * kept / max(len(some(rows)), 1))
