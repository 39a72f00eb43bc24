"""The stage that trains a policy, whatever its method."""

import logging
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dpo_core.data.tokens.config import TokenConfig
from dpo_core.errors import StageFailed
from dpo_core.estimates import estimate
from dpo_core.estimates.by_method import estimate_training
from dpo_core.generation.config import SamplingConfig
from dpo_core.methods.kto import imbalance
from dpo_core.methods.registry import methods
from dpo_core.rewards.functions import reward_identity
from tasks.recipe.policies import PolicyFields
from tasks.recipe.study import PlannedPolicy
from tasks.stages.base import Context, Output, RunningStage, Stage, StageResult, run_stage, stage_task
from tasks.stages.data import kind_of
from tasks.stages.planned_run import PlannedRun
from tasks.stages.training_job import TrainingSetup, key_settings_of, train, write_split
from tasks.store.facts import GateFacts, LogpsFacts, TrainingFacts, facts_of, weights_sha256
from tasks.store.manifest import Manifest

log = logging.getLogger("dpo")


def _estimate(run: PlannedRun, label: str) -> estimate.EstimatedWork:
    policy = run.nodes[label].config
    return estimate_training(policy.method, policy.settings, run.inputs(policy))


def _place_and_settings(run: PlannedRun, label: str) -> tuple[str, Any]:
    node = run.nodes[label]
    return f"policies.{node.policy}", node.config.settings


STAGES = {
    method.name: Stage(
        method.stage,
        method.version,
        method.artifact,
        TrainingFacts,
        _estimate,
        overhead=20.0,
        settings=_place_and_settings,
    )
    for method in methods().values()
    if method.policy
}
"""The training stage of each method, by the method's name."""


@dataclass(frozen=True)
class Scoring:
    """Sampling settings and reward of a method that samples."""

    sampling: SamplingConfig
    reward_model: Manifest | None
    """The reward model, if the policy learns from one."""
    reward: str | None
    """The known reward, if the policy learns from it."""
    gold: str | None = None
    """A known reward that is logged next to a learned one and never trained on."""


@dataclass(frozen=True)
class TrainedPolicy:
    """A trained policy, and the artifacts that its training needed."""

    node: PlannedPolicy
    manifest: Manifest
    needed: dict[str, Manifest]
    """Artifacts made after the reference that it needed and other policies may share, by name."""
    reward_model: Manifest | None = None
    """The reward model that it learned from."""


@dataclass(frozen=True)
class Training:
    """One policy to train."""

    policy: PolicyFields
    start: Manifest
    """Its initial weights."""
    reference: Manifest
    """The model that its KL term or log-ratios compare it with."""
    data: Manifest
    """Pairs, unpaired rows, or rows whose prompts are sampled."""
    tokens: TokenConfig
    seed: int
    logps: Manifest | None = None
    """Log-probs of the data under the reference, if the method reads them."""
    scoring: Scoring | None = None
    """Set for a method that samples."""

    @property
    def stage(self) -> Stage:
        """The stage of its method."""
        return STAGES[self.policy.method]

    @property
    def needs_reference_model(self) -> bool:
        """True if the training reads the reference itself, and not its cached log-probs."""
        return self.policy.entry.reference(self.policy.settings) in ("live", "errors")

    def inputs(self) -> dict[str, Manifest]:
        """The artifacts that the stage reads, by role."""
        samples = self.scoring is not None
        inputs: dict[str, Manifest] = {"prompts" if samples else kind_of(self.data): self.data}
        if not samples or self.start.sha256 != self.reference.sha256:
            inputs["policy"] = self.start
        if self.logps is not None:
            inputs["logps"] = self.logps
        if self.needs_reference_model:
            inputs["reference"] = self.reference
        if self.scoring is not None and self.scoring.reward_model is not None:
            inputs["reward_model"] = self.scoring.reward_model
        return inputs


@stage_task("train-policy", "{training.stage.name}{context.label}")
def train_policy(context: Context, training: Training) -> StageResult:
    """Train a policy from its start against its reference."""
    policy, scoring = training.policy, training.scoring
    setup = TrainingSetup(policy.entry, policy.settings, training.tokens, training.seed)

    def compute(running: RunningStage) -> Output:
        job: dict[str, Any] = {
            "model": str(training.start.path),
            "reference_logps": str(training.logps.path / "shard") if training.logps else None,
            "reference": str(training.reference.path) if training.needs_reference_model else None,
            "policy_is_reference": weights_sha256(training.start) == weights_sha256(training.reference),
        }
        if scoring is not None:
            rows = running.scratch / "prompts.parquet"
            count = write_split(training.data, "train", rows, distinct=["prompt", "chat"])
            job |= {
                "sampling": scoring.sampling.model_dump(mode="json"),
                "reward_source": str(scoring.reward_model.path) if scoring.reward_model else scoring.reward,
                "gold_source": scoring.gold,
            }
        else:
            rows = running.scratch / "train.parquet"
            count = write_split(training.data, "train", rows, limit=setup.settings.limit, seed=training.seed)
            if unpairs(policy, training.data):
                log.info("%s: %s", running.name, unpairing_note(policy, count))
                count *= 2
        return train(running, setup, job | {"data": str(rows)}, count)

    if training.logps is not None:
        _require_reference(training.reference, training.logps)
    key_settings = key_settings_of(setup)
    if scoring is not None:
        key_settings |= {
            "sampling": scoring.sampling.model_dump(mode="json"),
            "reward": reward_identity(scoring.reward),
        }
        if scoring.gold is not None:
            key_settings["gold"] = reward_identity(scoring.gold)
    return run_stage(context, training.stage, training.inputs(), key_settings, compute)


def _require_reference(reference: Manifest, logps: Manifest) -> None:
    if not logps.planned and facts_of(logps, LogpsFacts).reference_weights != weights_sha256(reference):
        raise StageFailed(
            "the cached log-probs belong to another reference",
            "Remove the folder cache-reference in store/index of the workspace, then resume the run",
        )


def unpairs(policy: PolicyFields, rows: Manifest) -> bool:
    """True if a method on unpaired rows gets pairs as its data."""
    return policy.entry.data == "unpaired" and kind_of(rows) == "pairs"


def unpairing_note(policy: PolicyFields, pairs: int) -> str:
    """A sentence on how a method on unpaired rows uses pairs."""
    return (
        f"objective {policy.settings.objective} learns from single answers: {pairs:,} pairs are taken apart, "
        "chosen as desirable and rejected as undesirable"
    )


def label_notes(policy: PolicyFields, rows: Manifest) -> dict[str, str]:
    """Notes for the run page: the number of answers of each label, and a warning on unbalanced weights."""
    if policy.entry.data != "unpaired":
        return {}
    if unpairs(policy, rows):
        split = pd.read_parquet(rows.path / "data.parquet", columns=["split"])["split"]
        good = bad = int((split == "train").sum())
        notes = {"Training data": unpairing_note(policy, good)}
    else:
        facts = facts_of(rows, GateFacts)
        good, bad = facts.desirable or 0, facts.undesirable or 0
        notes = {"Training data": f"{good:,} desirable and {bad:,} undesirable answers"}
    weights = imbalance(policy.settings.terms[0].parameters, good, bad)
    return notes | ({"Class weights": weights} if weights else {})
