"""Job files: the inputs, settings and outputs of each kind of job. Stages write them, every rank reads them.

Training has a file of its own: `dpo_core.methods.job.Job`.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from dpo_core.config import Config
from dpo_core.data.tokens.config import TokenConfig
from dpo_core.evaluation.config import EvaluateConfig, SuiteConfig
from dpo_core.generation.config import SamplingConfig
from dpo_core.methods.job import Job
from dpo_core.methods.pair_sampling import PairSamplingConfig
from dpo_core.models.config import ModelConfig
from dpo_core.ranks import PROGRESS
from dpo_core.scoring.precision import Precision

ERROR, STOP_FILE = "error.json", "stopped"
"""Files of the work folder: the error of a failed job, and the marker of a stopped one."""


class InferenceConfig(Config):
    """Ranks of the jobs that compute with a model without training it. No result depends on them."""

    processes: int | None = Field(None, ge=1)
    """Ranks on each node; they share the prompts, items or rows of a job. Empty: one for each GPU of a
    cluster's node, one on this machine."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of a rank; empty: its share of the cores."""
    lost_after_seconds: float = Field(12.0, ge=1)
    """How long another rank's node may be silent on the network before the job ends."""
    timeout_seconds: float = Field(600.0, gt=0)
    """How long a rank waits at the start for the others."""

    def on_node(self, gpus: int) -> "InferenceConfig":
        """With the number of ranks filled in, for a node with so many GPUs."""
        return self.model_copy(update={"processes": self.processes or max(gpus, 1)})


class ModelJob(Config):
    """Fields of every kind of job except training."""

    one_rank: ClassVar[bool] = False
    """Whether it runs as a single rank, on one node and without a GPU."""
    work: str
    """Folder for partial results, progress and the result; survives a kill. All nodes share it."""
    ranks: InferenceConfig = InferenceConfig()
    trusted_code: tuple[str, ...] = ()
    """sha256 of the Python files that ship with models and may run; see `remote_code`."""

    @property
    def processes(self) -> int:
        """Ranks on each node."""
        return 1 if self.one_rank else self.ranks.processes or 1


CHECK_VERSION = 1
"""Raised when the check gives other results than before: models are then checked again."""


class ImportJob(ModelJob):
    """Convert a model to a checkpoint folder, and check it if it is to be trained."""

    one_rank = True
    kind: Literal["import-model"] = "import-model"
    model: ModelConfig
    """The source."""
    out: str
    """The folder to write."""
    longest: int | None = None
    """Tokens of the longest rows to train on; empty: the model is only evaluated, and not checked."""
    precision: Precision = "bf16"
    """Precision of training."""


class CompareTokensJob(ModelJob):
    """Compare the tokens that two models read and write."""

    one_rank = True
    kind: Literal["compare-tokens"] = "compare-tokens"
    model: str
    """Checkpoint folder."""
    other: str
    """Checkpoint folder."""


class PairSamplingJob(ModelJob):
    """Draw completions of prompts, score them with a reward, and make pairs of them."""

    kind: Literal["sample-pairs"] = "sample-pairs"
    prompts: str
    """Parquet file of prompts."""
    model: str
    """Checkpoint folder that is sampled from."""
    out: str
    """Parquet file of pairs to write."""
    config: PairSamplingConfig
    tokens: TokenConfig
    reward: str
    """A name for `rewards.functions.load_reward`."""
    seed: int


class SceneCaptionsJob(ModelJob):
    """Make captioned images of solid scenes."""

    one_rank = True
    kind: Literal["scene-captions"] = "scene-captions"
    out: str
    """Folder to write."""
    count: int = Field(100_000, ge=1)
    """Images."""
    wrong: float = Field(0.25, ge=0, le=1)
    """Share of images that show what another caption says."""
    seed: int = 0


class ReferenceJob(ModelJob):
    """Compute the reference log-probs of a training's rows that the cache lacks."""

    kind: Literal["cache-reference"] = "cache-reference"
    model: str
    """Checkpoint folder of the reference."""
    weights_sha256: str
    described: str
    """Description of the reference, stored with the cache for people."""
    rows: str
    """Parquet file of the training rows."""
    method: str
    """A name of the method registry, whose training will read the log-probs."""
    settings: dict[str, Any]
    """Its settings."""
    tokens: TokenConfig
    caches: str
    """Folder with one cache for each reference."""
    out: str
    """Folder of the shard to write."""
    token_budget: int = Field(4096, ge=1)
    """Tokens in one forward pass; affects the time, not the values."""
    keep_seconds: float = Field(30.0, ge=0)
    """Seconds between saves: the work that a rank can lose by a kill."""


class RewardQualityJob(ModelJob):
    """Measure the quality of a reward model on held-out pairs."""

    kind: Literal["reward-quality"] = "reward-quality"
    model: str
    """Folder of the reward model."""
    pairs: str
    """Parquet file of pairs; the held-out ones are scored."""
    tokens: TokenConfig
    precision: Precision
    seed: int
    """Seed of the bootstrap intervals."""


class EvaluationJob(ModelJob):
    """Measure rewards, KL and preference accuracy of policies on the same held-out rows."""

    kind: Literal["evaluate"] = "evaluate"
    policies: dict[str, str]
    """Checkpoint folder of each policy by name."""
    reference: str
    """Checkpoint folder of the reference."""
    reference_name: str | None = None
    """The policy that is the reference, if it is among them: its KL is zero, and it has no accuracy."""
    prompts: str
    """Parquet file of rows; their held-out prompts are answered."""
    pairs: str | None = None
    """Parquet file of rows; the preference accuracy is measured on their held-out pairs."""
    config: EvaluateConfig
    tokens: TokenConfig
    reward: str
    """A name for `rewards.functions.load_reward`, or the folder of a reward model."""
    entropies: bool = True
    """Also measure the entropy of the next-token distributions along the samples."""
    seed: int


class NamedModel(Config):
    """A model that answers suites or prompts, with its name in tables."""

    name: str
    path: str
    """Checkpoint folder."""
    tokens: TokenConfig
    """How text becomes tokens, with the date that its chat template writes."""


PER_SUITE = 1000
"""Size of one model on one suite in the progress of `SuitesJob`."""


class SuitesJob(ModelJob):
    """Run evaluation suites on models."""

    kind: Literal["suites"] = "suites"
    models: list[NamedModel]
    model_suites: list[tuple[str, str]]
    """Names of the model and suite of each result, grouped by model."""
    files: dict[str, str]
    """Data file of each suite."""
    config: SuiteConfig
    reference: NamedModel | None = None
    """The reference of implicit rewards."""
    caches: str
    """Folder with one cache of log-probs for each reference."""


class AnswersJob(ModelJob):
    """Generate the answers of models to the same prompts."""

    kind: Literal["answers"] = "answers"
    models: list[NamedModel]
    prompts: str
    """Parquet file with the columns `prompt` and `chat`."""
    sampling: SamplingConfig
    seed: int


class ScoreJob(ModelJob):
    """Compute the rewards of answers."""

    kind: Literal["score"] = "score"
    reward: str
    """A name for `rewards.functions.load_reward`, or the folder of a reward model."""
    answers: str
    """Parquet file with the columns `prompt`, `chat` and `answer`."""
    tokens: TokenConfig
    """How a reward model reads text."""


def write_job(job: ModelJob | Job) -> Path:
    """Write the job file into the job's work folder."""
    work = Path(job.work)
    work.mkdir(parents=True, exist_ok=True)
    path = work / "job.json"
    path.write_text(job.model_dump_json(indent=1))
    for stale in work.glob(PROGRESS.format(rank="*")):
        stale.unlink()
    return path
