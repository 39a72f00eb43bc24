"""What each stage of a run would compute: tokens, operations, and the fullest micro-batch of a training.

Lengths come from the real rows and the real tokenizer where there are rows; completions that are still to be
sampled count with their most tokens, and the plan says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from dpo_core.data.load import load
from dpo_core.data.split import split_table
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.methods.dpo import DpoConfig
from dpo_core.methods.grpo import GroupConfig
from dpo_core.methods.kto import reads_mismatched, unpaired_examples
from dpo_core.methods.online_dpo import OnlineDpoConfig
from dpo_core.methods.ppo import PpoConfig
from dpo_core.models.load import ModelConfig, load_tokenizer, locate, read_config
from dpo_core.scoring import flops as cost
from dpo_core.scoring.layout import Document, Layout, pack, pad
from dpo_core.scoring.lm_head import keeps_logits
from dpo_core.training.batches import PackedBatches, PaddedBatches
from dpo_core.training.engine import EngineConfig
from dpo_core.training.loop import LoopConfig, PackedLoopConfig
from tasks.recipe.recipe import Recipe
from tasks.recipe.study import Settings
from tasks.stages.base import StageResult
from tasks.stages.training import chosen_side, demonstrations
from tasks.store.facts import ImportFacts, LoadFacts, facts_of
from tasks.store.manifest import Manifest

# Rows that are tokenised; of larger sets this many stand for all.
SAMPLED_ROWS = 2000


@dataclass(frozen=True)
class Work:
    """What a stage computes."""

    tokens: float = 0.0
    flops: float = 0.0
    precision: str = "fp32"
    engine: EngineConfig | None = None
    """Of a training stage; the fields below are its own too."""
    layout: Layout | None = None
    """The fullest micro-batch."""
    micro_batches: int = 1
    references: int = 0
    """Models in memory beside the trained one."""
    note: str = ""
    """What was assumed."""


@dataclass(frozen=True)
class Examples:
    """Prompts with completions; `documents` stand for `count` of them."""

    documents: list[Document]
    count: int
    note: str = ""

    def mean(self, value: Callable[[Document], float]) -> float:
        """Of one example."""
        return float(np.mean([value(d) for d in self.documents])) if self.documents else 0.0


class Workload:
    """The work of every stage of a recipe, from what the plan found in the store.

    Args:
        stages: what `compose` found; artifacts that are there are read.
        configs: for stages of a comparison study, by their label, the settings that differ from the recipe's.
    """

    def __init__(
        self,
        recipe: Recipe,
        stages: Mapping[str, StageResult],
        configs: Mapping[str, Settings] | None = None,
    ) -> None:
        self.recipe, self.stages, self.configs = recipe, stages, configs or {}
        base = stages["import-model"].manifest
        trust = recipe.model.trust_remote_code
        source = locate(recipe.model) if base.planned else base.path
        made = ModelConfig(name=str(base.path), trust_remote_code=trust)
        self.config = read_config(recipe.model if base.planned else made)
        self.layout = _layout(recipe, base)
        self.shape = cost.Shape.of(self.config)
        self.tokenise = Tokenise(load_tokenizer(source), recipe.tokens)
        self.kind = facts_of(stages["load-data"].manifest, LoadFacts).kind
        self.judged = self._rows(f"validate-{self.kind}", "load-data")
        self.pairs = {side: self._pairs(side) for side in ("train", "eval")}

    def of(self, stage: str) -> Work:
        """The work of a stage; nothing for those that do not run the model."""
        name, space, label = stage.partition(" ")
        recipe, own = self.recipe, self.configs.get(space + label)
        dpo = own if isinstance(own, DpoConfig) else recipe.dpo
        work = {
            "prepare-sft": self._sft,
            "sample-pairs": self._sampling,
            "cache-reference": lambda: self._cache(recipe.guide or dpo),
            "cache-guide": lambda: self._cache(dpo),
            "train-guide": lambda: self._dpo(dpo if own else recipe.guide or dpo),
            "train-dpo": lambda: self._dpo(dpo),
            "train-reward": self._reward,
            "train-ppo": lambda: self._online(own or recipe.ppo),
            "train-grpo": lambda: self._online(own or recipe.grpo or GroupConfig()),
            "train-online": lambda: self._online(own or recipe.online or OnlineDpoConfig()),
            "evaluate": lambda: self._evaluate(2 + len(recipe.online_methods())),
            "measure": lambda: self._evaluate(1),
            **dict.fromkeys(
                ("suites", "judge"), lambda: Work(note="the work of suites and judge is left out")
            ),
        }.get(name)
        return work() if work else Work()

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

    def _trained_on(self, config: DpoConfig) -> Examples:
        """What an objective learns from: pairs, or single answers, into which it takes pairs apart."""
        if self.kind == "unpaired":
            rows = self.judged[self.judged["split"] == "train"]
            kept, _ = unpaired_examples(self.tokenise, _some(rows).to_dict("records"))
            documents = [Document(e.sequence.prompt, (e.sequence.completion,)) for e in kept]
            found = Examples(documents, round(len(rows) * len(kept) / max(len(_some(rows)), 1)))
        else:
            found = self.pairs["train"]
        if config.limit is not None:
            found = replace(found, count=min(found.count, config.limit))
        if config.unpaired and self.kind != "unpaired":
            documents = [Document(d.prompt, (side,)) for d in found.documents for side in d.branches]
            found = replace(found, documents=documents, count=2 * found.count)
        return found

    def _pairs_to_come(self, side: str) -> Examples:
        config = self.recipe.pairs
        prompts, count = self._prompts(side, config.sampling.max_new_tokens)
        drawn = config.samples_per_prompt
        each = drawn * (drawn - 1) // 2 if config.pairing == "all" else 1
        documents = [Document(p, (_unknown(config.sampling.max_new_tokens),) * 2) for p in prompts]
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

    def _sft(self) -> Work:
        return self._loop(self._demonstrations(), self.recipe.sft)

    def _dpo(self, config: DpoConfig) -> Work:
        work = self._loop(self._trained_on(config), config)
        if not config.needs_live_reference and not config.unpaired:
            return work
        # A live reference reads every example too; KTO's z_0 and BCO's δ take a pass of the policy.
        trained = cost.training(self.shape, 1, 0, 0)
        again = work.flops * cost.forward(self.shape, 1, 0, 0) / trained
        return replace(work, flops=work.flops + again, references=int(config.needs_live_reference))

    def _reward(self) -> Work:
        pairs = self.pairs["train"]
        # The whole answer is read and only its end is scored.
        documents = [
            Document(d.prompt + d.branches[0], tuple(b[-1:] for b in d.branches)) for d in pairs.documents
        ]
        return self._loop(Examples(documents, pairs.count, pairs.note), self.recipe.reward.model)

    def _loop(self, examples: Examples, config: LoopConfig) -> Work:
        """A training over fixed examples."""
        packed = isinstance(config, PackedLoopConfig) and config.pack_tokens is not None
        packed = packed and self.layout.startswith("packed")
        steps = config.steps(examples.count)
        seen = steps * min(config.batch_size, examples.count)
        sizes = [cost.sizes(d, packed) for d in examples.documents]
        tokens, squares, scored = (float(np.mean(column)) for column in zip(*sizes, strict=True))
        layout, micro_batches = self._fullest(examples, config, packed)
        flops = cost.training(
            self.shape,
            tokens,
            squares,
            scored,
            checkpointing=config.engine.gradient_checkpointing,
            head_again=not keeps_logits(len(layout.targets_N), self.shape.vocabulary),
        )
        return Work(
            tokens=seen * tokens,
            flops=seen * flops,
            precision=config.engine.precision,
            engine=config.engine,
            layout=layout,
            micro_batches=micro_batches,
            note=examples.note,
        )

    def _fullest(self, examples: Examples, config: LoopConfig, packed: bool) -> tuple[Layout, int]:
        """The largest micro-batch of the first epoch on the first rank, and how many a step has."""
        ranks, seed = config.engine.processes, self.recipe.seed
        of = np.resize(np.arange(len(examples.documents)), max(examples.count, 1))
        documents = examples.documents
        if packed and isinstance(config, PackedLoopConfig) and config.pack_tokens is not None:
            lengths = np.array([len(d) for d in documents])[of]
            batches: Any = PackedBatches(
                lengths, config.batch_size, config.pack_tokens, epochs=1, seed=seed, rank=0, world=ranks
            )
            steps = batches.plans[0].steps
        else:
            rows = np.array([max(len(d.prompt) + len(b) for b in d.branches) for d in documents])[of]
            size = config.rows_at_a_time(ranks)
            batches = PaddedBatches(rows.tolist(), config.batch_size, size, seed=seed, rank=0, world=ranks)
            lengths, steps = rows, max(1, len(rows) // config.batch_size)
        micros = [m for step in range(min(steps, config.steps(len(of)))) for m in batches.of_step(step).mine]
        fullest = max(micros, key=lambda m: (sum if packed else max)(int(lengths[i]) for i in m))
        chosen = [documents[of[i]] for i in fullest]
        return (pack if packed else pad)(chosen), batches.micro_batches

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
        return Work(count * tokens, count * flops, note="every completion of the most tokens")

    def _cache(self, config: DpoConfig) -> Work:
        examples = self._trained_on(config.model_copy(update={"limit": None}))  # the cache holds all rows
        tokens, flops = self._read(examples)
        times = 1 + reads_mismatched(config)
        return Work(times * tokens, times * flops, config.engine.precision, note=examples.note)

    def _read(self, examples: Examples) -> tuple[float, float]:
        """Tokens and operations of one forward pass over all examples, each prompt once."""
        sizes = [cost.sizes(d, packed=True) for d in examples.documents] or [cost.Sizes(0.0, 0.0, 0.0)]
        means = [float(np.mean(column)) for column in zip(*sizes, strict=True)]
        return examples.count * means[0], examples.count * cost.forward(self.shape, *means)

    def _online(self, config: Any) -> Work:
        """Rounds of sampling, reading twice, scoring and updating; PPO's critic reads and learns too."""
        new = self.recipe.evaluate.sampling.max_new_tokens
        prompts, _ = self._prompts("train", new, distinct=True)
        documents = [Document(p, (_unknown(new),)) for p in prompts]
        episodes = Examples(documents, config.iterations * config.episodes)
        drawn = episodes.count * cost.generation(self.shape, map(len, prompts), new) / len(prompts)
        tokens, once = self._read(episodes)
        sizes = [cost.sizes(d, packed=False) for d in documents]
        trained = cost.training(self.shape, *(float(np.mean(column)) for column in zip(*sizes, strict=True)))
        learned, critic = self.recipe.reward.learned, isinstance(config, PpoConfig)
        # Of a prompt's samples, online DPO trains on the best and the worst.
        share = 2 / config.samples_each if isinstance(config, OnlineDpoConfig) else 1
        longest = sorted(documents, key=len)[-config.micro_batch_size :]
        updates = config.iterations * config.epochs * config.minibatches
        shared = config.micro_batch_size * config.engine.processes
        return Work(
            tokens=tokens * (1 + config.epochs * share),
            flops=drawn
            + (2 + learned + critic) * once
            + (1 + critic) * share * episodes.count * config.epochs * trained,
            precision=config.engine.precision,
            engine=config.engine,
            layout=pad(longest),
            micro_batches=max(1, round(share * episodes.count * config.epochs / (updates * shared))),
            # The critic is in memory with its gradients and the two moments of its optimiser.
            references=1 + learned + 4 * critic,
            note="every completion of the most tokens",
        )

    def _evaluate(self, policies: int) -> Work:
        config, new = self.recipe.evaluate, self.recipe.evaluate.sampling.max_new_tokens
        drawn = self._drawn("eval", new, config.samples_per_prompt, config.prompts)
        held_out = self.pairs["eval"]
        tokens, read = self._read(replace(held_out, count=min(held_out.count, config.pairs)))
        # Each policy samples, reads its samples, and the reference reads them too.
        again = drawn.tokens * cost.forward(self.shape, 1, 0, 0)
        return replace(
            drawn,
            tokens=policies * (drawn.tokens + tokens),
            flops=policies * (drawn.flops + read) + (2 * policies - 1) * again,
            precision=config.sampling.precision,
        )


def _some(rows: pd.DataFrame) -> pd.DataFrame:
    return rows if len(rows) <= SAMPLED_ROWS else rows.sample(SAMPLED_ROWS, random_state=0)


def _unknown(tokens: int) -> tuple[int, ...]:
    """A completion of which only the length counts."""
    return (0,) * tokens


def _layout(recipe: Recipe, base: Manifest) -> str:
    """`packed: why`, as the import found it or, where there was none yet, as it would find it.

    Raises:
        ModelError: the run would refuse the model.
    """
    if not base.planned:
        facts = facts_of(base, ImportFacts)
        return f"{facts.layout}: {facts.reason}"
    from dpo_core.model_check import check_named

    longest, precision = recipe.tokens.max_length, recipe.dpo.engine.precision
    check = check_named(recipe.model, precision=precision, longest=longest)
    check.require()
    return f"{check.layout}: {check.reason}"
