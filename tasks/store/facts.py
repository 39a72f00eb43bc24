"""What stages state about their artifacts, one model for each kind of stage, kept in the manifest's `extra`.

Writing is strict: a fact without a field here is an error in the stage that states it. Reading is lenient:
manifests of earlier versions lack newer facts and hold some that are no longer stated.
"""

from typing import Literal, TypeVar

from pydantic import ConfigDict, Field, JsonValue, ValidationError

from dpo_core.config import Config
from dpo_core.errors import StageFailed
from dpo_core.rewards.quality import RewardQuality
from tasks.store.manifest import Manifest

F = TypeVar("F", bound="Facts")


class Facts(Config):
    """What any stage may state: the cost of its work."""

    # A metric that is not finite is no reason to lose a training: the store writes null for it.
    model_config = ConfigDict(allow_inf_nan=True)

    seconds: float | None = None
    """Time of the work, of a training that of its steps."""
    flops: float | None = None
    """Floating-point operations."""
    tokens_trained: float | None = None
    """Tokens that a training read."""
    peak_memory_bytes: int | None = None
    """Of the training process that took most."""

    def as_extra(self) -> dict[str, JsonValue]:
        """The facts that were stated, as a manifest keeps them; defaults are left out."""
        return {name: v for name, v in self.model_dump(mode="json").items() if name in self.model_fields_set}


class LoadFacts(Facts):
    """How the data were read. A plan knows the kind alone."""

    kind: Literal["pairs", "unpaired", "prompts"]
    format: str = ""
    recognised_by: str = ""
    """A sentence: how the format was recognised."""
    read_on: str | None = None
    """The day of the first reading, as an ISO date."""
    eval_rows: int = 0
    remarks: list[str] = Field(default_factory=list)
    """Sentences on what was read in a way that is not plain, and on columns that were not read."""
    sources: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Rows for `train` and `eval` of each set of a mixture; empty for a single set."""
    rows_read: int = 0
    ties_dropped: int = 0
    of_other_splits: int = 0
    single_answers: int = 0
    faults: int = 0
    left_by_limit: int = 0


class GateFacts(Facts):
    """What passed the data gate."""

    dropped: int = 0
    warnings: list[str] = Field(default_factory=list)
    """Rules that failed and did not refuse."""
    held_out_prompts: int | None = None
    written_as: str = ""
    """How prompts became tokens, where there was a choice."""
    with_agreement: int | None = None
    """Training pairs that say how many annotators agreed."""
    desirable: int | None = None
    undesirable: int | None = None
    """Training rows of each label, of unpaired rows."""


class SamplingFacts(Facts):
    """Pairs that were made of samples."""

    samples: int
    pairs: int
    ties: int
    """Candidate pairs whose rewards were equal."""
    mean_reward: float


class ModelFacts(Facts):
    """A model, whichever stage made it."""

    weights_sha256: str | None = None
    """Digest of the weights alone; none of a reward model."""


class Origin(Config):
    """Where a model that was trained here comes from."""

    name: str
    """`models:/NAME/VERSION` or `runs:/RUN/POLICY`."""
    title: str
    """`dpo-demo version 3 (champion)`."""
    sha256: str
    """Digest of its artifact."""
    run: str | None = None
    """The run that trained it; none where MLflow does not know it any more."""

    @property
    def sentence(self) -> str:
        """`dpo-demo version 3 (champion), trained by the run demo-20261125-224737`."""
        by = f", trained by the run {self.run}" if self.run and self.run not in self.title else ""
        return self.title + by


class OriginFacts(ModelFacts):
    """Where a model was taken from."""

    started_from: Origin | None = None
    """The registered version, or the run, that the recipe names; none of other models."""


class ImportFacts(OriginFacts):
    """The base model and how it can be trained (`dpo_core.model_check.ModelCheck`)."""

    layout: str
    reason: str
    sampling: str
    remote_code_sha256: str = "not recorded"
    """Of Python code that ships with the model, where that was allowed to run."""


class TrainingFacts(ModelFacts):
    """A trained model."""

    steps: int | None = None
    final: dict[str, float | None] = Field(default_factory=dict)
    """The metrics of the last step."""


class RewardFacts(TrainingFacts):
    """A trained reward model."""

    quality: RewardQuality | None = None
    """On held-out pairs; none without such."""


class LogpsFacts(Facts):
    """Cached log-probs."""

    reference_weights: str
    """`weights_sha256` of the model whose log-probs these are."""
    precision: str
    attention: str
    sequences: int
    computed: int
    """Sequences that were not in the cache yet."""
    from_cache: int
    dropped_refused_by_template: int = 0
    dropped_empty_prompt: int = 0
    dropped_empty_completion: int = 0
    dropped_identical_after_truncation: int = 0


def facts_of(manifest: Manifest, model: type[F]) -> F:
    """The facts of an artifact.

    Args:
        model: what to read; one that other facts derive from reads those of all of them.

    Raises:
        StageFailed: a fact is missing or of the wrong type.
    """
    known = {name: value for name, value in manifest.extra.items() if name in model.model_fields}
    try:
        return model.model_validate(known)
    except ValidationError as error:
        names = ", ".join(".".join(map(str, e["loc"])) for e in error.errors())
        raise StageFailed(
            f"the manifest of stage {manifest.stage} ({manifest.sha256[:12]}) does not state {names}",
            "Run the recipe again in another workspace, or remove the stage's entries from store/index",
        ) from error


def with_facts(manifest: Manifest, facts: Facts) -> Manifest:
    """The manifest with these facts in place of its own, for this run; the store keeps what it has."""
    return manifest.model_copy(update={"extra": manifest.extra | facts.as_extra()})


def weights_sha256(manifest: Manifest) -> str:
    """Digest of a model's weights.

    Raises:
        StageFailed: its manifest does not state it.
    """
    weights = facts_of(manifest, ModelFacts).weights_sha256
    if weights is None:
        raise StageFailed(
            f"the manifest of stage {manifest.stage} ({manifest.sha256[:12]}) does not state weights_sha256",
            "Name a language model, or run the stages that made it again",
        )
    return weights


def scalar_facts(manifest: Manifest) -> dict[str, JsonValue]:
    """The facts that fit in a table's cell, for display."""
    return {name: value for name, value in manifest.extra.items() if not isinstance(value, dict | list)}
