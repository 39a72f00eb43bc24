"""The evaluation stage: the reference, the policies and the champion on the same held-out prompts."""

import json
import logging
import re
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

from dpo_core.checked_json import read_checked, write_checked
from dpo_core.config import Config
from dpo_core.data.tokens.tokenise import TokenConfig
from dpo_core.errors import StageFailed
from dpo_core.evaluation.config import EvaluateConfig
from dpo_core.evaluation.policy_row import VERSION, PolicyRow
from dpo_core.judging.results import WinRate
from dpo_core.rewards.functions import reward_identity
from dpo_core.statistics.estimates import Estimate
from tasks.recipe.policies import CHAMPION, REFERENCE
from tasks.reports.run_report import Measured, Sample
from tasks.stages.base import Context, Output, Stage, StageResult, Work, run_stage, stage_task
from tasks.stages.data import kind_of
from tasks.store.facts import Facts
from tasks.store.manifest import Manifest
from tasks.tracking.mlflow_run import metric_keys

log = logging.getLogger("dpo")

FILE, ANSWERS_FILE = "evaluation.json", "answers.json"
EVALUATE = Stage(
    "evaluate",
    VERSION,
    "evaluation",
    Facts,
    lambda w, _: w.evaluated(1 + len(w.recipe.policies)),
    overhead=5.0,
)


@dataclass(frozen=True)
class EvaluationSettings:
    """How policies are measured, beside the models and data."""

    config: EvaluateConfig
    tokens: TokenConfig
    seed: int
    """Of the samples; the same for every policy, so that differences are paired."""
    reward: str | None
    """The known reward, where there is one."""

    def as_slice(self, exclude: Set[str] = frozenset()) -> dict[str, Any]:
        """Their part of a stage's key, without fields of `config` that the stage does not read."""
        return {
            "config": self.config.model_dump(mode="json", exclude=set(exclude)),
            "tokens": self.tokens.model_dump(mode="json"),
            "reward": reward_identity(self.reward),
            "seed": self.seed,
        }


class Answers(Config):
    """All that the policies answered."""

    prompts: list[str]
    prompt_index: list[int]
    """Of each answer, its prompt's place."""
    answers: dict[str, list[str]]
    """By policy."""
    rewards: dict[str, list[float]]


@stage_task(EVALUATE.name)
def evaluate(
    context: Context,
    policies: dict[str, Manifest],
    prompts: Manifest,
    pairs: Manifest,
    reward_model: Manifest | None,
    settings: EvaluationSettings,
) -> StageResult:
    """Reward, KL, win rate, length, distinct-2 and preference accuracy, each with its 95 % interval.

    Args:
        policies: checkpoint of each policy by name; `SFT` is the reference, `Champion` the registered model
            that a new one is held against.
        pairs: what was trained on; the preference accuracy is measured where these are pairs.
    """

    def work(given: Work) -> Output:
        measured, answers, flops = _evaluate(given, policies, prompts, pairs, reward_model, settings)
        out = given.fresh("out")
        (out / FILE).write_text(measured.model_dump_json(indent=1, exclude_unset=True))
        (out / ANSWERS_FILE).write_text(json.dumps(answers.model_dump(), ensure_ascii=False, allow_nan=False))
        given.mlflow.artifact(out / FILE)
        metrics = {"cost/flops": flops}
        keys = metric_keys(row.name for row in measured.policies)
        for row in measured.policies:
            metrics |= {f"{name}/{keys[row.name]}": value for name, value in row.values().items()}
        for name, by_source in measured.accuracy_by_source.items():
            for source, accuracy in by_source.items():
                # MLflow takes no other signs; of a long path the end tells most.
                label = re.sub(r"[^\w. -]", "_", source)[-60:]
                metrics[f"accuracy/{keys[name]}/{label}"] = accuracy.value
        return Output(out, rows=measured.n_prompts, facts=Facts(flops=flops), metrics=metrics)

    inputs = {f"policy-{name}": manifest for name, manifest in policies.items()}
    inputs |= {"prompts": prompts, kind_of(pairs): pairs}
    if reward_model:
        inputs["reward_model"] = reward_model
    return run_stage(context, EVALUATE, inputs, settings.as_slice(), work)


def _evaluate(
    given: Work,
    policies: dict[str, Manifest],
    prompts: Manifest,
    pairs: Manifest,
    reward_model: Manifest | None,
    settings: EvaluationSettings,
) -> tuple[Measured, Answers, float]:
    """What the policies were measured at, all that they answered, and the operations that it took."""
    from dpo_core.data.tokens.tokenise import Tokenise
    from dpo_core.evaluation.policies import sequence_logps
    from dpo_core.evaluation.summary import summarise
    from dpo_core.models.load import load_model, load_tokenizer
    from dpo_core.rewards.model import scorer
    from dpo_core.scoring.logprobs import read_flops

    config, seed = settings.config, settings.seed
    reference_path = policies[REFERENCE].path
    tokenise = Tokenise(load_tokenizer(reference_path), settings.tokens)
    asked = held_out_prompts(prompts, tokenise, config)
    rows = _held_out_pairs(pairs, tokenise, config.pairs, seed)
    source = str(reward_model.path) if reward_model else str(settings.reward)
    score = scorer(source, tokenise, config.precision)
    reference = load_model(reference_path)
    bar = given.progress(len(policies) * len(asked) * config.samples_per_prompt)
    sides = [s for p in rows for s in (p.chosen, p.rejected)]
    known = sequence_logps(reference, sides, config.precision, config.token_budget)
    held_out = _HeldOut(asked, rows, sides, known, _sources(pairs))
    by_policy: dict[str, dict[str, Any]] = {}
    for number, (name, manifest) in enumerate(policies.items()):
        path = given.scratch / f"policy-{name}.json"
        # A killed evaluation keeps the policies it had finished.
        facts = read_checked(path, f"{name} is measured again")
        if facts is None:
            policy = reference if name == REFERENCE else load_model(manifest.path)
            done = number * len(asked) * config.samples_per_prompt
            facts = _measure(
                policy,
                reference,
                held_out,
                settings,
                score,
                tokenise.stop_ids,
                lambda n, done=done: bar.update(done + n),
            )
            facts["flops"] += _scoring_flops(reference, facts) if reward_model else 0.0
            facts["texts"] = [tokenise.text(s["completion"], s["prompt"]) for s in facts["sequences"]]
            write_checked(path, facts)
            facts = json.loads(json.dumps(facts))  # as one that is read
        by_policy[name] = facts
    samples = {name: _samples(facts) for name, facts in by_policy.items()}
    table = []
    for name, facts in by_policy.items():
        baseline = None if name == REFERENCE else samples[REFERENCE]
        row = summarise(samples[name], baseline, seed=seed, length=config.sampling.max_new_tokens)
        accuracy = None if name == REFERENCE else facts["accuracy"]
        table.append(PolicyRow(name=name, **row, accuracy=accuracy))
    flops = read_flops(reference, sides, config.token_budget) + sum(f["flops"] for f in by_policy.values())
    reward_name = "reward model" if reward_model else str(settings.reward)
    texts = [text for _, text in asked]
    measured = Measured(
        reward_name=reward_name,
        reward_is_true=reward_model is None,
        n_prompts=len(asked),
        samples_per_prompt=config.samples_per_prompt,
        held_out_pairs=len(rows),
        accuracy_by_source={
            name: facts["accuracy_by_source"]
            for name, facts in by_policy.items()
            if facts["accuracy_by_source"]
        },
        policies=table,
        samples=_side_by_side(samples, asked, config.shown),
        gain_over_champion=_over_champion(samples, seed),
        win_rates=_win_rates(samples, texts, reward_name, seed),
    )
    answers = Answers(
        prompts=texts,
        prompt_index=samples[REFERENCE].prompt_index,
        answers={name: drawn.texts for name, drawn in samples.items()},
        rewards={name: drawn.rewards for name, drawn in samples.items()},
    )
    return measured, answers, flops


def _win_rates(samples: dict[str, Any], prompts: Sequence[str], judge: str, seed: int) -> list[WinRate]:
    """By the reward: every policy against the reference, and against the champion where there is one."""
    from dpo_core.judging.judge import AnswerPairs, judge_by_scores, win_rate

    rates = []
    for name, rival in rivals(list(samples)):
        drawn, other = samples[name], samples[rival]
        index = drawn.prompt_index
        texts = [prompts[i] for i in index]
        pairs = AnswerPairs(name, rival, texts, drawn.texts, other.texts, clusters=index)
        judgements = judge_by_scores(drawn.rewards, other.rewards)
        rates.append(win_rate(judgements, pairs, judge=judge, seed=seed))
    return rates


def rivals(policies: Sequence[str]) -> list[tuple[str, str]]:
    """Who is held against whom: every policy against the reference, then against a champion that is there."""
    return [
        (name, rival)
        for rival in (REFERENCE, CHAMPION)
        for name in policies
        if rival in policies and name not in (REFERENCE, rival)
    ]


def _over_champion(samples: dict[str, Any], seed: int) -> dict[str, Estimate]:
    """What each policy gains over the champion on the same prompts; empty where there is no champion."""
    from dpo_core.statistics.estimates import paired_bootstrap

    champion = samples.get(CHAMPION)
    if champion is None:
        return {}
    return {
        name: paired_bootstrap(drawn.rewards, champion.rewards, drawn.prompt_index, seed=seed)
        for name, drawn in samples.items()
        if name not in (REFERENCE, CHAMPION)
    }


def held_out_prompts(
    prompts: Manifest, tokenise: Any, config: EvaluateConfig
) -> list[tuple[tuple[int, ...], str]]:
    import pandas as pd

    frame = pd.read_parquet(prompts.path / "data.parquet")
    frame = frame[frame["split"] == "eval"].drop_duplicates(["prompt", "chat"]).head(config.prompts)
    if frame.empty:
        raise StageFailed("no held-out prompt is left to evaluate on", "Raise data.eval_fraction")
    room = config.sampling.max_new_tokens
    asked = [(tokenise.prompt_of(row, room), row["prompt"]) for row in frame.to_dict("records")]
    return [(ids, text) for ids, text in asked if ids]


def _held_out_pairs(pairs: Manifest, tokenise: Any, most: int, seed: int) -> list[Any]:
    import pandas as pd

    frame = pd.read_parquet(pairs.path / "data.parquet")
    if "chosen" not in frame:
        return []  # unpaired rows: there is nothing to prefer
    frame = frame[frame["split"] == "eval"]
    if len(frame) > most:
        frame = frame.sample(most, random_state=seed)
    return tokenise.pairs(frame.to_dict("records"))[0]


def _sources(pairs: Manifest) -> dict[str, str]:
    """The set of a mixture that each held-out pair is of, by its id; empty for a single set."""
    import pandas as pd

    frame = pd.read_parquet(pairs.path / "data.parquet")
    if "source" not in frame:
        return {}
    frame = frame[(frame["split"] == "eval") & (frame["source"] != "")]
    return dict(zip(frame["id"], frame["source"], strict=True))


@dataclass(frozen=True)
class _HeldOut:
    """What every policy is measured on."""

    prompts: Sequence[tuple[tuple[int, ...], str]]
    """Ids and text of each."""
    pairs: Sequence[Any]
    sides: Sequence[Any]
    """The sequences of the pairs, chosen and rejected in turn."""
    reference_logps: Sequence[Any]
    """Of the sides."""
    sources: dict[str, str]
    """The set of a mixture that a pair is of, by the pair's id."""


def _measure(
    policy: Any,
    reference: Any,
    held_out: _HeldOut,
    settings: EvaluationSettings,
    score: Any,
    stop_ids: frozenset[int],
    progress: Any,
) -> dict[str, Any]:
    """Samples of one policy with rewards and KL, its accuracy on the held-out pairs, and the operations."""
    from dpo_core.evaluation.policies import (
        kl_estimates,
        own_scores,
        preference_accuracy,
        sample_policy,
        sequence_logps,
    )
    from dpo_core.scoring import flops as cost
    from dpo_core.scoring.logprobs import read_flops
    from dpo_core.scoring.model_shape import shape_of

    same, config = policy is reference, settings.config
    drawn = sample_policy(
        policy,
        held_out.prompts,
        config,
        scorer=score,
        eos_id=stop_ids,
        seed=settings.seed,
        progress=progress,
    )
    computing = (config.precision, config.token_budget)
    ours, drawn.entropies = own_scores(policy, drawn.sequences, *computing)
    theirs = ours if same else sequence_logps(reference, drawn.sequences, *computing)
    drawn.kl_k1, drawn.kl_k3 = kl_estimates(ours, theirs)
    drawn.entropy = -float(sum(x.double().sum() for x in ours)) / sum(len(x) for x in ours)
    lengths = [(len(s.prompt), len(s.completion)) for s in drawn.sequences]
    flops = cost.sampling(shape_of(policy), lengths)
    flops += read_flops(policy, drawn.sequences, config.token_budget) * (1 if same else 2)
    accuracy, by_source = None, {}
    pairs, known = held_out.pairs, held_out.reference_logps
    if pairs and not same:
        flops += read_flops(policy, held_out.sides, config.token_budget)
        ours = sequence_logps(policy, held_out.sides, *computing)
        accuracy = preference_accuracy(pairs, ours, known).model_dump()
        by_source = _accuracy_by_source(pairs, ours, known, held_out.sources)
    return {**asdict(drawn), "accuracy": accuracy, "accuracy_by_source": by_source, "flops": flops}


def _accuracy_by_source(
    pairs: Sequence[Any], ours: Sequence[Any], theirs: Sequence[Any], sources: dict[str, str]
) -> dict[str, Any]:
    """The preference accuracy on the held-out pairs of each set of a mixture."""
    from dpo_core.evaluation.policies import preference_accuracy

    places: dict[str, list[int]] = {}
    for at, pair in enumerate(pairs):
        if source := sources.get(pair.id):
            places.setdefault(source, []).append(at)
    found = {}
    for source, listed in places.items():
        sides = [side for at in listed for side in (2 * at, 2 * at + 1)]
        some = [pairs[at] for at in listed], [ours[i] for i in sides], [theirs[i] for i in sides]
        found[source] = preference_accuracy(*some).model_dump()
    return found


def _scoring_flops(reference: Any, facts: dict[str, Any]) -> float:
    """Operations of a reward model, which was made of the reference, on the samples."""
    from dpo_core.rewards.model import scoring_flops
    from dpo_core.scoring.model_shape import shape_of

    return scoring_flops(shape_of(reference).as_reward_model(), _samples(facts).sequences)


def _samples(facts: dict[str, Any]) -> Any:
    from dpo_core.data.tokens.tokenise import Sequence as Ids
    from dpo_core.evaluation.summary import PolicySamples

    fields = {k: v for k, v in facts.items() if k not in ("accuracy", "accuracy_by_source", "flops")}
    fields["sequences"] = [Ids(tuple(s["prompt"]), tuple(s["completion"])) for s in facts["sequences"]]
    return PolicySamples(**fields)


def _side_by_side(
    samples: dict[str, Any], asked: Sequence[tuple[tuple[int, ...], str]], shown: int
) -> list[Sample]:
    """The first sample of each policy for the first prompts."""
    table = []
    for index in range(min(shown, len(asked))):
        texts, rewards = {}, {}
        for name, drawn in samples.items():
            first = drawn.prompt_index.index(index)
            texts[name] = drawn.texts[first]
            rewards[name] = drawn.rewards[first]
        table.append(Sample(prompt=readable(asked[index][1]), completions=texts, rewards=rewards))
    return table


def readable(prompt: str) -> str:
    """A prompt for people: turns on lines of their own where it is a conversation."""
    try:
        turns = json.loads(prompt)
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    except (ValueError, TypeError, KeyError):
        return prompt


def load_evaluation(manifest: Manifest) -> Measured:
    """What the stage wrote."""
    return Measured.model_validate_json((manifest.path / FILE).read_bytes())


def load_answers(manifest: Manifest) -> Answers:
    """What the stage wrote."""
    return Answers.model_validate_json((manifest.path / ANSWERS_FILE).read_bytes())
