"""What each kind of training job is made of: module, examples, trainer, and how its result is written."""

import json
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from dpo_core.data.tokens.tokenise import Sequence, TokenConfig, Tokenise
from dpo_core.errors import StageFailed
from dpo_core.methods.dpo import DpoTrainer
from dpo_core.methods.grpo import GroupTrainer
from dpo_core.methods.job import Job
from dpo_core.methods.kto import UnpairedTrainer, unpaired_examples
from dpo_core.methods.online.sampler import Scorer, Surroundings
from dpo_core.methods.online_dpo import OnlineDpoTrainer
from dpo_core.methods.ppo import PpoTrainer, make_critic
from dpo_core.methods.sft import Demonstration, SftTrainer
from dpo_core.models.dropout import disable_dropout
from dpo_core.models.load import check_context, config_in, load_model, load_tokenizer
from dpo_core.models.lora import add_lora, merge_lora
from dpo_core.models.remote_code import trust_digests
from dpo_core.models.save import export_policy
from dpo_core.reference import LogpShard
from dpo_core.rewards.functions import load_reward
from dpo_core.scoring import flops as cost
from dpo_core.scoring.attention import trunk_of
from dpo_core.training.engine import put_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Given the full trained weights, write the result.
Export = Callable[[dict[str, Tensor]], None]


def build(job: Job) -> tuple[Any, Export]:
    """The trainer of a job and the function that writes what it trained."""
    trust_digests(job.trusted_code)
    builders = {"sft": _sft, "dpo": _dpo, "reward": _reward, "ppo": _ppo, "grpo": _grpo, "online": _online}
    return builders[job.kind](job)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a parquet file as dictionaries."""
    return pd.read_parquet(path).to_dict("records")


def _start(job: Job) -> tuple[Any, Any, Tokenise]:
    tokenizer = load_tokenizer(Path(job.model))
    model = load_model(Path(job.model))
    check_context(model.config, job.tokens.max_length)
    disable_dropout(model)
    lora = getattr(job.settings, "lora", None)
    if lora:
        add_lora(model, lora, job.seed)
    return model, tokenizer, Tokenise(tokenizer, job.tokens)


def _export_model(model: Any, tokenizer: Any, job: Job) -> Export:
    def export(state: dict[str, Tensor]) -> None:
        put_state(model, state)
        if job.settings.lora:
            merge_lora(model)
        export_policy(model, tokenizer, Path(job.model), Path(job.out))

    return export


def _sft(job: Job) -> tuple[Any, Export]:
    model, tokenizer, tokenise = _start(job)
    examples = []
    for row in read_rows(job.data):
        sequence = tokenise.demonstration(row)
        if isinstance(sequence, Sequence):
            examples.append(Demonstration(row["id"], sequence))
    trainer = SftTrainer(model, examples, job.settings, seed=job.seed, work=Path(job.work))
    return trainer, _export_model(model, tokenizer, job)


def _dpo(job: Job) -> tuple[Any, Export]:
    if job.settings.unpaired:
        return _unpaired(job)
    model, tokenizer, tokenise = _start(job)
    pairs, dropped = tokenise.pairs(read_rows(job.data))
    if not pairs:
        raise StageFailed(f"no training row is left after tokenising ({dropped})", "Raise tokens.max_length")
    live = job.live_reference
    trainer = DpoTrainer(
        model,
        pairs,
        job.settings,
        reference=LogpShard.open(Path(job.reference)) if job.reference else None,
        live_reference=load_model(Path(live)) if live else None,
        policy_is_reference=job.policy_is_reference,
        seed=job.seed,
        work=Path(job.work),
    )
    return trainer, _export_model(model, tokenizer, job)


def _unpaired(job: Job) -> tuple[Any, Export]:
    model, tokenizer, tokenise = _start(job)
    examples, _ = unpaired_examples(tokenise, read_rows(job.data))
    trainer = UnpairedTrainer(
        model,
        examples,
        job.settings,
        reference=LogpShard.open(Path(job.reference)) if job.reference else None,
        policy_is_reference=job.policy_is_reference,
        seed=job.seed,
        work=Path(job.work),
    )
    return trainer, _export_model(model, tokenizer, job)


def _around(job: Job, tokenise: Tokenise) -> Surroundings:
    """What a method that trains on its own samples needs beside its models."""
    if job.reference is None or job.sampling is None or job.reward_source is None:
        raise StageFailed(
            f"the {job.kind} job lacks its reference, sampling settings or reward", "Write them"
        )
    asked = [
        (tokenise.prompt_of(row, job.sampling.max_new_tokens), row["prompt"]) for row in read_rows(job.data)
    ]
    prompts = [(ids, text) for ids, text in asked if ids]
    precision = job.settings.engine.precision
    return Surroundings(
        prompts=prompts,
        sampling=job.sampling,
        eos_id=tokenise.stop_ids,
        scorer=scorer(job.reward_source, tokenise, precision),
        gold=scorer(job.gold_source, tokenise, precision) if job.gold_source else None,
        scoring_flops=scoring_flops(job.reward_source),
        seed=job.seed,
        work=Path(job.work),
    )


def _reference(job: Job) -> Any:
    return load_model(Path(str(job.reference)))


def _ppo(job: Job) -> tuple[Any, Export]:
    from dpo_core.models.reward_model import RewardModel

    policy, tokenizer, tokenise = _start(job)
    around = _around(job, tokenise)
    reference = _reference(job)
    learned = is_reward_model(str(job.reward_source))
    critic = RewardModel.load(str(job.reward_source)) if learned else make_critic(reference)
    disable_dropout(critic)
    trainer = PpoTrainer(policy, reference, critic, around, job.settings)
    return trainer, _export_policy(policy, tokenizer, job)


def _grpo(job: Job) -> tuple[Any, Export]:
    policy, tokenizer, tokenise = _start(job)
    around = _around(job, tokenise)
    trainer = GroupTrainer(policy, _reference(job), around, job.settings)
    return trainer, _export_policy(policy, tokenizer, job)


def _online(job: Job) -> tuple[Any, Export]:
    policy, tokenizer, tokenise = _start(job)
    around = _around(job, tokenise)
    trainer = OnlineDpoTrainer(policy, _reference(job), around, job.settings)
    return trainer, _export_policy(policy, tokenizer, job)


def _export_policy(policy: Any, tokenizer: Any, job: Job) -> Export:
    def export(state: dict[str, Tensor]) -> None:
        policy.load_state_dict(state)
        export_policy(policy, tokenizer, Path(job.model), Path(job.out))

    return export


def _reward(job: Job) -> tuple[Any, Export]:
    from dpo_core.methods.reward import RewardTrainer, normalise_on
    from dpo_core.models.reward_model import RewardModel

    model, tokenizer, tokenise = _start(job)
    pairs, _ = tokenise.pairs(read_rows(job.data))
    reward_model = RewardModel(trunk_of(model), torch.Generator().manual_seed(job.seed))
    trainer = RewardTrainer(reward_model, pairs, job.settings, seed=job.seed, work=Path(job.work))

    def export(state: dict[str, Tensor]) -> None:
        put_state(reward_model, state)
        facts = normalise_on(reward_model, pairs, job.settings.engine.precision)
        reward_model.save(Path(job.out))
        tokenizer.save_pretrained(job.out)
        (Path(job.out) / "reward.json").write_text(json.dumps(facts))

    return trainer, export


def scorer(source: str, tokenise: "Tokenise | PreTrainedTokenizerBase", precision: str) -> Scorer:
    """The reward of finished completions: a reward model's folder, or a name for `load_reward`.

    Args:
        tokenise: turns completions into the texts that a reward reads.
    """
    if is_reward_model(source):
        from dpo_core.methods.reward import score
        from dpo_core.models.reward_model import RewardModel

        model = RewardModel.load(Path(source))
        return lambda sequences, prompts: score(model, sequences, precision)
    reward = load_reward(source)

    known = tokenise if isinstance(tokenise, Tokenise) else Tokenise(tokenise, TokenConfig())

    def by_text(sequences: Seq[Sequence], prompts: Seq[str]) -> list[float]:
        return reward(list(prompts), [known.text(s.completion, s.prompt) for s in sequences])

    return by_text


def is_reward_model(source: str) -> bool:
    """Whether a reward's source is the folder of a trained reward model."""
    return Path(source, "reward.json").is_file()


def scoring_flops(source: str) -> Callable[[Seq[Sequence]], float]:
    """Operations of scoring sequences; those of a reward that is no model of ours are unknown and count 0."""
    if not is_reward_model(source):
        return lambda sequences: 0.0
    from dpo_core.methods import reward as reward_training

    shape = cost.Shape.of(config_in(Path(source, "backbone"))).as_reward_model()
    return lambda sequences: reward_training.scoring_flops(shape, sequences)
