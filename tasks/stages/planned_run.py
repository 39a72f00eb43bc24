"""`PlannedRun`: model shape, tokenizer and rows of a run to come, for the estimates of its stages.

Lengths come from the actual rows and tokenizer. Completions that are not sampled yet count with the maximum
number of tokens, and the plan says so.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd

from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.estimates.estimate import CAPPED, EstimatedWork, Examples, Inputs, read, unknown
from dpo_core.examples.unpaired import unpaired_examples
from dpo_core.generation.config import SamplingConfig
from dpo_core.scoring import flops as cost
from dpo_core.scoring.document import Document
from tasks.recipe.policies import PolicyFields
from tasks.recipe.recipe import Recipe
from tasks.recipe.study import PlannedPolicy

SAMPLED_ROWS = 2000
"""At most so many rows are tokenised; the estimate for all rows is extrapolated from them."""


@dataclass(frozen=True)
class PlannedRun:
    """The model, tokenizer and rows of a planned run."""

    recipe: Recipe
    config: Any
    """Configuration of the model."""
    layout: str
    """`packed: why`, or `padded: why`."""
    tokenise: Tokenise
    kind: Literal["pairs", "unpaired", "prompts"]
    """Kind of the data."""
    gated: pd.DataFrame
    """Rows of the data that passed the gate; before the gate has run, those without a fault."""
    sampled: pd.DataFrame | None = None
    """Sampled pairs that passed the gate; None if none are sampled yet."""

    @cached_property
    def shape(self) -> cost.Shape:
        """The model's shape."""
        from dpo_core.scoring.model_shape import shape_of_config  # noqa: PLC0415 - dpo plan only: loads torch

        return shape_of_config(self.config)

    @cached_property
    def nodes(self) -> dict[str, PlannedPolicy]:
        """The policies to train, by the label of their stages."""
        return {node.label: node for node in self.recipe.nodes()}

    def inputs(self, policy: PolicyFields | None = None) -> Inputs:
        """The inputs of a training's estimate."""
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
            data: pairs, unpaired (pairs are taken apart), or prompts, each with a completion of full length.
        """
        if data == "prompts":
            new = self.recipe.evaluate.sampling.max_new_tokens
            prompts, count = self.prompts("train", new, distinct=True)
            return Examples([Document(p, (unknown(new),)) for p in prompts], count)
        if self.kind == "unpaired":
            rows = self.gated[self.gated["split"] == "train"]
            kept, _ = unpaired_examples(self.tokenise, sample_rows(rows).to_dict("records"))
            documents = [Document(e.sequence.prompt, (e.sequence.completion,)) for e in kept]
            return Examples(documents, _usable(rows, len(kept))).limited(limit)
        pairs = self.pairs["train"].limited(limit)
        if data == "pairs":
            return pairs
        sides = [Document(d.prompt, (side,)) for d in pairs.documents for side in d.branches]
        return replace(pairs, documents=sides, count=2 * pairs.count)

    @cached_property
    def pairs(self) -> dict[str, Examples]:
        """The pairs of each side of the split, train and eval; none if the data is unpaired."""
        return {side: self._pairs(side) for side in ("train", "eval")}

    def _pairs(self, side: str) -> Examples:
        if self.kind == "unpaired":
            return Examples([], 0)
        frame = self.gated if self.kind == "pairs" else self.sampled
        if frame is None:
            return self._unsampled_pairs(side)
        rows = frame[frame["split"] == side]
        kept, _ = self.tokenise.pairs(sample_rows(rows).to_dict("records"))
        return Examples([Document.of(p.chosen, p.rejected) for p in kept], _usable(rows, len(kept)))

    def _unsampled_pairs(self, side: str) -> Examples:
        config = self.recipe.pairs
        prompts, count = self.prompts(side, config.sampling.max_new_tokens)
        each = config.most_pairs
        documents = [Document(p, (unknown(config.sampling.max_new_tokens),) * 2) for p in prompts]
        note = f"pairs are not sampled yet: at most {each} per prompt, each answer of maximum length"
        return Examples(documents, count * each, note)

    def prompts(self, side: str | None, new: int, distinct: bool = False) -> tuple[list[Any], int]:
        """Token ids of a sample of a side's prompts, and the number of usable ones among all.

        Usable prompts leave room for `new` tokens.
        """
        rows = self.gated if side is None else self.gated[self.gated["split"] == side]
        if distinct:
            rows = rows.drop_duplicates(["prompt", "chat"])
        prompts = [self.tokenise.prompt_of(row, new) for row in sample_rows(rows).to_dict("records")]
        kept = [ids for ids in prompts if ids]
        return kept, _usable(rows, len(kept))

    def sampling_work(
        self, side: str | None, sampling: SamplingConfig, each: int, most: int | None = None
    ) -> EstimatedWork:
        """The work of sampling `each` completions for all prompts of a side, or `most`."""
        new = sampling.max_new_tokens
        prompts, count = self.prompts(side, new, distinct=most is not None)
        count = min(count, most or count) * each
        lengths = [len(p) for p in prompts]
        flops = cost.generation(self.shape, lengths, new) / max(len(lengths), 1)
        tokens = float(np.mean(lengths)) + new
        return EstimatedWork(count * tokens, count * flops, note=CAPPED)

    def evaluation_work(self, policies: int) -> EstimatedWork:
        """The work of an evaluation of `policies` models, the reference among them.

        Each model samples and scores its samples, and the reference scores them too.
        """
        config = self.recipe.evaluate
        sampling = self.sampling_work("eval", config.sampling, config.samples_per_prompt, config.prompts)
        tokens, reading = read(self.shape, self.pairs["eval"].limited(config.pairs))
        again = sampling.tokens * cost.forward(self.shape, 1, 0, 0)
        return replace(
            sampling,
            tokens=policies * (sampling.tokens + tokens),
            flops=policies * (sampling.flops + reading) + (2 * policies - 1) * again,
            precision=config.sampling.precision,
        )


def sample_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, or a seeded sample of `SAMPLED_ROWS` of them."""
    return rows if len(rows) <= SAMPLED_ROWS else rows.sample(SAMPLED_ROWS, random_state=0)


def _usable(rows: pd.DataFrame, kept: int) -> int:
    """Estimated number of usable rows, from the number `kept` of the tokenised rows."""
    return round(len(rows) * kept / max(len(sample_rows(rows)), 1))
