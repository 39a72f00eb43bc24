"""What each stage of a run would compute: tokens, operations, and the fullest micro-batch of a training.

Lengths come from the real rows and the real tokenizer where there are rows; completions that are still to be
sampled count with their most tokens, and the plan says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from dpo_core.data.load import load
from dpo_core.data.split import split_table
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.methods import reward, sft
from dpo_core.methods.estimate import CAPPED, Examples, Inputs, Work, read, unknown
from dpo_core.methods.unpaired_rows import unpaired_examples
from dpo_core.models.load import ModelConfig, load_tokenizer, locate, read_config
from dpo_core.scoring import flops as cost
from dpo_core.scoring.layout import Document
from tasks.recipe.policies import REFERENCE, PolicyFields
from tasks.recipe.recipe import Recipe
from tasks.stages.base import StageResult
from tasks.stages.data import SAMPLE
from tasks.stages.evaluation import EVALUATE
from tasks.stages.judging import JUDGE
from tasks.stages.measure import MEASURE
from tasks.stages.models import CACHE
from tasks.stages.prepare_sft import SFT, chosen_side, demonstrations
from tasks.stages.suites import SUITES
from tasks.stages.train_reward import REWARD
from tasks.store.facts import ImportFacts, LoadFacts, facts_of
from tasks.store.manifest import Manifest

# Rows that are tokenised; of larger sets this many stand for all.
SAMPLED_ROWS = 2000


class Workload:
    """The work of every stage of a recipe, from what the plan found in the store.

    Args:
        stages: what `compose` found; artifacts that are there are read.
    """

    def __init__(self, recipe: Recipe, stages: Mapping[str, StageResult]) -> None:
        self.recipe, self.stages = recipe, stages
        self.nodes = {node.config.entry.stage + node.label: node for node in recipe.nodes()}
        base = stages["import-model"].manifest
        trust = recipe.model.trust_remote_code
        source = locate(recipe.model) if base.planned else base.path
        made = ModelConfig(name=str(base.path), trust_remote_code=trust)
        self.config = read_config(recipe.model if base.planned else made)
        self.layout = _layout(recipe, base)
        self.shape = cost.Shape.of(self.config)
        self.tokenise = Tokenise(load_tokenizer(source), recipe.tokens)
        self.kind = str(facts_of(stages["load-data"].manifest, LoadFacts).kind)
        self.judged = self._rows(f"validate-{self.kind}", "load-data")
        self.pairs = {side: self._pairs(side) for side in ("train", "eval")}

    def of(self, stage: str) -> Work:
        """The work of a stage; nothing for those that do not run the model."""
        if stage in self.nodes:
            policy = self.nodes[stage].config
            return policy.entry.estimate(policy.settings, self._inputs(policy))
        name = stage.partition(" ")[0]
        recipe = self.recipe
        work: dict[str, Callable[[], Work]] = {
            SFT.name: lambda: sft.estimate(recipe.sft, self._inputs()),
            REWARD.name: lambda: reward.estimate(recipe.reward.model, self._inputs()),
            SAMPLE.name: self._sampling,
            CACHE.name: lambda: self._cache(stage.removeprefix(CACHE.name).strip() or REFERENCE),
            EVALUATE.name: lambda: self._evaluate(1 + len(recipe.policies)),
            MEASURE.name: lambda: self._evaluate(1),
            **dict.fromkeys(
                (SUITES.name, JUDGE.name), lambda: Work(note="the work of suites and judge is left out")
            ),
        }
        return work[name]() if name in work else Work()

    def settings(self, stage: str) -> tuple[str, Any] | None:
        """Where the recipe has the settings of a training stage, and the settings; None of other stages."""
        if stage in self.nodes:
            node = self.nodes[stage]
            return f"policies.{node.policy}", node.config.settings
        own = {SFT.name: ("sft", self.recipe.sft), REWARD.name: ("reward.model", self.recipe.reward.model)}
        return own.get(stage.partition(" ")[0])

    def _inputs(self, policy: PolicyFields | None = None) -> Inputs:
        return Inputs(
            shape=self.shape,
            examples=self._examples,
            packed=self.layout.startswith("packed"),
            seed=self.recipe.seed,
            new_tokens=self.recipe.evaluate.sampling.max_new_tokens,
            learned_reward=policy is not None and self.recipe.learns_from_model(policy),
        )

    # Examples ----------------------------------------------------------------------------------------------

    def _rows(self, *names: str) -> pd.DataFrame:
        """The first of these artifacts that is there, else the source itself."""
        for name in names:
            found = self.stages.get(name)
            if found is not None and found.cached:
                frame = pd.read_parquet(found.manifest.path / "data.parquet")
                break
        else:
            frame = split_table(load(self.recipe.data), self.recipe.data)
        return frame[frame["fault"] == ""]

    def _pairs(self, side: str) -> Examples:
        if self.kind == "unpaired":
            return Examples([], 0)
        if self.kind == "prompts" and not self.stages["validate-pairs"].cached:
            return self._pairs_to_come(side)
        frame = self.judged if self.kind == "pairs" else self._rows("validate-pairs")
        rows = frame[frame["split"] == side]
        kept, _ = self.tokenise.pairs(_some(rows).to_dict("records"))
        documents = [Document.of(p.chosen, p.rejected) for p in kept]
        return Examples(documents, round(len(rows) * len(kept) / max(len(_some(rows)), 1)))

    def _examples(self, data: str, limit: int | None = None) -> Examples:
        """The training examples of a kind of data; single answers of pairs are both of their sides."""
        if data == "demonstrations":
            return self._demonstrations()
        if data == "prompts":
            new = self.recipe.evaluate.sampling.max_new_tokens
            prompts, count = self._prompts("train", new, distinct=True)
            return Examples([Document(p, (unknown(new),)) for p in prompts], count)
        if self.kind == "unpaired":
            rows = self.judged[self.judged["split"] == "train"]
            kept, _ = unpaired_examples(self.tokenise, _some(rows).to_dict("records"))
            documents = [Document(e.sequence.prompt, (e.sequence.completion,)) for e in kept]
            whole = Examples(documents, round(len(rows) * len(kept) / max(len(_some(rows)), 1)))
            return whole.limited(limit)
        pairs = self.pairs["train"].limited(limit)
        if data == "pairs":
            return pairs
        sides = [Document(d.prompt, (side,)) for d in pairs.documents for side in d.branches]
        return replace(pairs, documents=sides, count=2 * pairs.count)

    def _pairs_to_come(self, side: str) -> Examples:
        config = self.recipe.pairs
        prompts, count = self._prompts(side, config.sampling.max_new_tokens)
        drawn = config.samples_per_prompt
        each = drawn * (drawn - 1) // 2 if config.pairing == "all" else 1
        documents = [Document(p, (unknown(config.sampling.max_new_tokens),) * 2) for p in prompts]
        note = f"pairs still to be sampled: at most {each} a prompt, each answer of the most tokens"
        return Examples(documents, count * each, note)

    def _prompts(self, side: str | None, new: int, distinct: bool = False) -> tuple[list[Any], int]:
        """Ids of (some of) the prompts, and how many there are."""
        rows = self.judged if side is None else self.judged[self.judged["split"] == side]
        if distinct:
            rows = rows.drop_duplicates(["prompt", "chat"])
        some = _some(rows).to_dict("records")
        prompts = [self.tokenise.prompt_of(row, new) for row in some]
        kept = [ids for ids in prompts if ids]
        return kept, round(len(rows) * len(kept) / max(len(some), 1))

    def _demonstrations(self) -> Examples:
        config = self.recipe.sft
        if config.made_demonstrations is None and config.demonstrations is None:
            rows = chosen_side(self.judged, self.kind)
        else:
            rows = demonstrations(config, None, self.recipe.seed)[0]()
        documents = []
        for row in rows[:SAMPLED_ROWS]:
            found = self.tokenise.demonstration(row)
            if not isinstance(found, str):
                documents.append(Document.of(found))
        return Examples(documents, len(rows))

    # Stages ------------------------------------------------------------------------------------------------

    def _sampling(self) -> Work:
        config = self.recipe.pairs
        return self._drawn(None, config.sampling.max_new_tokens, config.samples_per_prompt)

    def _drawn(self, side: str | None, new: int, each: int, most: int | None = None) -> Work:
        """Sampling after every prompt of a side."""
        prompts, count = self._prompts(side, new, distinct=most is not None)
        count = min(count, most or count) * each
        lengths = [len(p) for p in prompts]
        flops = cost.generation(self.shape, lengths, new) / max(len(lengths), 1)
        tokens = float(np.mean(lengths)) + new
        return Work(count * tokens, count * flops, note=CAPPED)

    def _cache(self, reference: str) -> Work:
        """Reading what the first policy held to this reference trains on; the cache holds all rows."""
        name = reference.partition(" seed ")[0]
        policy = next(p for p in self.recipe.policies.values() if p.reference == name and p.entry.cached)
        examples = self._examples(policy.entry.data)
        tokens, flops = read(self.shape, examples)
        times = 1 + bool(getattr(policy.settings, "reads_mismatched", False))
        precision = policy.settings.engine.precision
        return Work(times * tokens, times * flops, precision, note=examples.note)

    def _evaluate(self, policies: int) -> Work:
        config, new = self.recipe.evaluate, self.recipe.evaluate.sampling.max_new_tokens
        drawn = self._drawn("eval", new, config.samples_per_prompt, config.prompts)
        held_out = self.pairs["eval"]
        tokens, reading = read(self.shape, replace(held_out, count=min(held_out.count, config.pairs)))
        # Each policy samples, reads its samples, and the reference reads them too.
        again = drawn.tokens * cost.forward(self.shape, 1, 0, 0)
        return replace(
            drawn,
            tokens=policies * (drawn.tokens + tokens),
            flops=policies * (drawn.flops + reading) + (2 * policies - 1) * again,
            precision=config.sampling.precision,
        )


def _some(rows: pd.DataFrame) -> pd.DataFrame:
    return rows if len(rows) <= SAMPLED_ROWS else rows.sample(SAMPLED_ROWS, random_state=0)


def _layout(recipe: Recipe, base: Manifest) -> str:
    """`packed: why`, as the import found it or, where there was none yet, as it would find it.

    Raises:
        ModelError: the run would refuse the model.
    """
    if not base.planned:
        facts = facts_of(base, ImportFacts)
        return f"{facts.layout}: {facts.reason}"
    from dpo_core.model_check import check_named

    longest, precision = recipe.tokens.max_length, recipe.precision
    check = check_named(recipe.model, precision=precision, longest=longest)
    check.require()
    return f"{check.layout}: {check.reason}"
