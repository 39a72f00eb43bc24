"""Typed facts about artifacts (metrics, counts, origins), one model per kind of stage.

They are stored in the manifest's `extra`. Writing is strict: a fact without a field here is an error. Reading
is lenient: manifests of earlier versions lack newer facts and contain facts that were removed since.
"""

from typing import Literal, TypeVar

from pydantic import ConfigDict, Field, JsonValue, ValidationError

from dpo_core.config import Config
from dpo_core.errors import StageFailed
from dpo_core.rewards.quality import RewardQuality
from tasks.store.manifest import Manifest

F = TypeVar("F", bound="Facts")


class Facts(Config):
    """Facts of any stage: the cost of its work."""

    # A metric that is not finite must not lose a training: the store writes null for it.
    model_config = ConfigDict(allow_inf_nan=True)

    seconds: float | None = None
    """Wall-clock time; of a training, the time of its steps."""
    flops: float | None = None
    """Floating-point operations."""
    tokens_trained: float | None = None
    """Tokens processed by a training."""
    peak_memory_bytes: int | None = None
    """Peak of the training process that used most."""

    def as_extra(self) -> dict[str, JsonValue]:
        """The facts that were set, as JSON for a manifest; unset ones are left out."""
        return {name: v for name, v in self.model_dump(mode="json").items() if name in self.model_fields_set}


class LoadFacts(Facts):
    """How the data were read. In a plan, only the kind is known."""

    kind: Literal["pairs", "unpaired", "prompts"]
    format: str = ""
    recognised_by: str = ""
    """A sentence that says how the format was recognised."""
    read_on: str | None = None
    """The day on which the data were first read, as an ISO date."""
    eval_rows: int = 0
    remarks: list[str] = Field(default_factory=list)
    """Sentences about conversions that were made and columns that were not read."""
    sources: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Rows for `train` and `eval` of each set of a mixture; empty for a single set."""
    rows_read: int = 0
    ties_dropped: int = 0
    of_other_splits: int = 0
    single_answers: int = 0
    faults: int = 0
    left_by_limit: int = 0


class GateFacts(Facts):
    """The rows that passed the data gate."""

    dropped: int = 0
    warnings: list[str] = Field(default_factory=list)
    """Failed rules with severity warning."""
    held_out_prompts: int | None = None
    written_as: str = ""
    """How prompts become tokens, if there was a choice."""
    with_agreement: int | None = None
    """Training pairs that say how many annotators agreed."""
    answer_tokens: float | None = None
    """Median length of the chosen or desirable answers, the end of the turn included; none of prompts."""
    answers_ended: float | None = None
    """Share of them that end; an answer that was sampled up to a limit does not."""
    desirable: int | None = None
    undesirable: int | None = None
    """Training rows of each label, of unpaired rows."""


class SamplingFacts(Facts):
    """Preference pairs made from sampled completions."""

    samples: int
    pairs: int
    ties: int
    """Candidate pairs whose rewards were equal."""
    mean_reward: float


class ModelFacts(Facts):
    """A model, whichever stage made it."""

    weights_sha256: str | None = None
    """Digest of the weights alone; None for a reward model."""


class Origin(Config):
    """The registry version or run from which a trained model was taken."""

    name: str
    """`models:/NAME/VERSION` or `runs:/RUN/POLICY`."""
    title: str
    """`dpo-demo version 3 (champion)`."""
    sha256: str
    """Digest of its artifact."""
    run: str | None = None
    """The run that trained it; None if that run was deleted in MLflow."""

    @property
    def sentence(self) -> str:
        """`dpo-demo version 3 (champion), trained by the run demo-20261125-224737`."""
        by = f", trained by the run {self.run}" if self.run and self.run not in self.title else ""
        return self.title + by


class OriginFacts(ModelFacts):
    """The origin of a model."""

    started_from: Origin | None = None
    """The registered version or the run that the recipe names; None for other models."""


class ImportFacts(OriginFacts):
    """The base model and how it can be trained (`dpo_core.model_check.ModelCheck`)."""

    layout: str
    reason: str
    sampling: str
    remote_code_sha256: str = "not recorded"
    """Digest of the Python code that ships with the model, if it was allowed to run."""


class TrainingFacts(ModelFacts):
    """A trained model."""

    steps: int | None = None
    final: dict[str, float | None] = Field(default_factory=dict)
    """The metrics of the last step."""


class RewardFacts(TrainingFacts):
    """A trained reward model."""

    quality: RewardQuality | None = None
    """Quality on held-out pairs; None without held-out pairs."""


class LogpsFacts(Facts):
    """Cached log-probs."""

    reference_weights: str
    """`weights_sha256` of the model that computed the log-probs."""
    precision: str
    attention: str
    sequences: int
    computed: int
    """Sequences computed by this run, because the cache did not contain them."""
    from_cache: int
    dropped_refused_by_template: int = 0
    dropped_empty_prompt: int = 0
    dropped_empty_completion: int = 0
    dropped_identical_after_truncation: int = 0


def facts_of(manifest: Manifest, model: type[F]) -> F:
    """The facts of an artifact.

    Args:
        model: the facts class to read; a base class reads the facts of all its subclasses.

    Raises:
        StageFailed: a fact is missing or of the wrong type.
    """
    known = {name: value for name, value in manifest.extra.items() if name in model.model_fields}
    try:
        return model.model_validate(known)
    except ValidationError as error:
        names = ", ".join(".".join(map(str, e["loc"])) for e in error.errors())
        raise StageFailed(
            f"the result of stage {manifest.stage} ({manifest.sha256[:12]}) lacks valid facts ({names})",
            f"Remove the folder {manifest.stage} in store/index of the workspace, then run the recipe again",
        ) from error


def with_facts(manifest: Manifest, facts: Facts) -> Manifest:
    """A copy of the manifest with these facts, for this run. The stored manifest is not changed."""
    return manifest.model_copy(update={"extra": manifest.extra | facts.as_extra()})


def weights_sha256(manifest: Manifest) -> str:
    """Digest of a model's weights.

    Raises:
        StageFailed: the manifest has none.
    """
    weights = facts_of(manifest, ModelFacts).weights_sha256
    if weights is None:
        raise StageFailed(
            f"the manifest of stage {manifest.stage} ({manifest.sha256[:12]}) has no weights_sha256",
            "Use a language model, or run the stages that made it again",
        )
    return weights


def scalar_facts(manifest: Manifest) -> dict[str, JsonValue]:
    """The facts that are single values, for tables."""
    return {name: value for name, value in manifest.extra.items() if not isinstance(value, dict | list)}
