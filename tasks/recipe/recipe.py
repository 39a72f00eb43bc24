"""One recipe = one YAML = one run: everything that decides it."""

import importlib.util
import json
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from dpo_core.config import Config
from dpo_core.data.config import DataConfig
from dpo_core.data.tokens.tokenise import TokenConfig
from dpo_core.evaluation.config import EvaluateConfig, PromotionConfig, SuitesConfig
from dpo_core.jobs.files import InferenceConfig
from dpo_core.judging.config import JudgeConfig
from dpo_core.methods import dpo
from dpo_core.methods.pair_sampling import PairSamplingConfig
from dpo_core.methods.reward import RewardModelConfig
from dpo_core.methods.sft import SftConfig
from dpo_core.models.config import ModelConfig
from dpo_core.models.lora_config import LORA_EXTRA
from dpo_core.objectives import get
from dpo_core.scoring.precision import Precision
from expectations.config import GateConfig
from tasks.recipe.policies import (
    CLASSES,
    Policy,
    PolicyFields,
    check_is_read,
    check_names,
    in_order,
    require_methods,
)
from tasks.recipe.sections import CacheConfig, RegistryConfig, RewardConfig, TrackingConfig
from tasks.recipe.study import Node, StudyConfig, check_study, nodes

_ALONE = "Delete the other fields under {0}, or override the whole section: --set '{0}={{enabled: false}}'"


class Recipe(Config):
    """Everything that decides an alignment run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,60}$")
    """Names the run, its experiment and its model."""
    description: str = ""
    """Shown in the MLflow run and on the run page."""
    workspace: str = "./runs"
    """Folder of the artifact store, the tracking database and the run pages."""
    seed: int = Field(0, ge=0)
    """Seed of sampling, order of examples and intervals."""
    model: ModelConfig = ModelConfig()
    """Where the run starts from."""
    data: DataConfig
    """Preference pairs, single answers labelled desirable or not, or prompts."""
    gate: GateConfig = GateConfig()
    """The data gate."""
    tokens: TokenConfig = TokenConfig()
    """From text to tokens."""
    sft: SftConfig = SftConfig()
    """Preparing the reference."""
    pairs: PairSamplingConfig = PairSamplingConfig()
    """Sampling pairs; read only when the data has prompts but no pairs."""
    reward: RewardConfig = RewardConfig()
    """What completions are worth."""
    cache: CacheConfig = CacheConfig()
    """Reference log-probs."""
    policies: Annotated[dict[str, Policy], BeforeValidator(require_methods)] = Field(
        default_factory=lambda: {"DPO": CLASSES[dpo.METHOD.name](method=dpo.METHOD.name)}, min_length=1
    )
    """What is trained, by name; see `dpo methods`."""
    candidate: str | None = Field(None, min_length=1)
    """The policy that is registered and may be promoted. Empty: the first."""
    study: StudyConfig | None = None
    """A comparison study instead of one alignment: the policies over a grid and seeds."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation on held-out prompts."""
    inference: InferenceConfig = InferenceConfig()
    """Ranks of the jobs that import, sample, score and evaluate; each training has its own in `engine`."""
    suites: SuitesConfig = SuitesConfig()
    """Evaluation suites: preferences, capabilities, harm."""
    judge: JudgeConfig | None = None
    """A language model that says which policy's answers are better. Empty: the reward alone says it."""
    promotion: PromotionConfig = PromotionConfig()
    """What the model must show to be promoted."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    registry: RegistryConfig = RegistryConfig()
    """The model registry."""

    @model_validator(mode="after")
    def _policies_fit(self) -> "Recipe":
        check_names(self.policies)
        in_order(self.policies)
        check_is_read(self.policies, known_reward=self.reward.source is not None)
        if self.candidate is not None and self.candidate not in self.policies:
            raise ValueError(
                f"candidate: there is no policy '{self.candidate}'; there are {', '.join(self.policies)}"
            )
        for name, policy in self.policies.items():
            if getattr(policy, "lora", None) and importlib.util.find_spec("peft") is None:
                raise ValueError(f"policies.{name}.lora needs peft, which is not installed: {LORA_EXTRA}")
        if self.study is not None:
            check_study(self.policies, self.study)
        return self

    @model_validator(mode="after")
    def _what_is_set_is_read(self) -> "Recipe":
        if not self.learned_reward and self.reward.model != RewardModelConfig():
            raise ValueError(
                "reward.model would not be read: reward.source gives a known reward; a policy with "
                "reward: model learns from a reward model all the same"
            )
        if self.data.openings is not None:
            if self.reward.source is None:
                raise ValueError(
                    "reward.source is needed: without pairs only a known reward can label samples"
                )
            if self.sft.enabled and self.sft.demonstrations is None and self.sft.made_demonstrations is None:
                raise ValueError(
                    "SFT has nothing to learn from: set sft.demonstrations (a file), sft.made_demonstrations "
                    "(a number), or sft.enabled to false"
                )
        if not self.sft.enabled and self.sft != SftConfig(enabled=False):
            raise ValueError(f"sft.* would not be read: sft.enabled is false. {_ALONE.format('sft')}")
        if self.sft.lora and importlib.util.find_spec("peft") is None:
            raise ValueError(f"sft.lora needs peft, which is not installed: {LORA_EXTRA}")
        for name in ("pairs", "evaluate"):
            new = getattr(self, name).sampling.max_new_tokens
            if new >= self.tokens.max_length:
                raise ValueError(f"{name}.sampling.max_new_tokens {new} leaves no room in tokens.max_length")
        return self

    @model_validator(mode="after")
    def _what_is_asked_beside_the_reward(self) -> "Recipe":
        if self.study is not None:
            if self.reward.source is None:
                raise ValueError("study compares true rewards: set reward.source")
            if self.suites.names or self.judge:
                raise ValueError("suites and judge would not be read: a comparison study asks neither")
            if self.candidate is not None:
                raise ValueError("candidate would not be read: a comparison study registers no model")
            if self.evaluate.prompts < 2:
                raise ValueError("study needs intervals over prompts: set evaluate.prompts to 2 or more")
        if self.judge and self.judge.kind != "llm":
            raise ValueError("judge.kind must be llm: the run measures with its reward anyway")
        return self

    def nodes(self) -> list[Node]:
        """Every policy to train, each after those that it needs."""
        return list(nodes(self.policies, self.study, self.seed))

    @property
    def candidate_name(self) -> str:
        """The policy that is registered."""
        return self.candidate or next(iter(self.policies))

    @property
    def precision(self) -> Precision:
        """In which the candidate is trained, and models are checked."""
        precision: Precision = self.policies[self.candidate_name].settings.engine.precision
        return precision

    def learns_from_model(self, policy: PolicyFields) -> bool:
        """Whether a policy learns from a reward model that is trained on the pairs."""
        return policy.entry.scored and (self.reward.source is None or policy.reward == "model")

    @property
    def learned_reward(self) -> bool:
        """Whether a reward model is trained."""
        return self.reward.source is None or any(map(self.learns_from_model, self.policies.values()))

    @property
    def margin_by_agreement(self) -> bool:
        """Whether the reward model's margins are read from the pairs."""
        return self.learned_reward and self.reward.model.margin == "agreement"

    def without_default_parameters(self) -> "Recipe":
        """The same recipe, to start another from: parameters that are an objective's defaults are left out.

        Written out, they would stay when the objective is changed to one whose defaults are others.
        """

        def trimmed(part: Any) -> Any:
            if not hasattr(part, "objective"):
                return part
            own = get(part.objective).parameters
            kept = {name: value for name, value in part.parameters.items() if value != own[name].default}
            changes: dict[str, Any] = {"parameters": kept}
            if plus := getattr(part, "plus", None):
                changes["plus"] = [trimmed(term) for term in plus]
            return part.model_copy(update=changes)

        return self.model_copy(update={"policies": {n: trimmed(p) for n, p in self.policies.items()}})

    @property
    def unusual_parameters(self) -> list[str]:
        """A sentence for each parameter of an objective that is far from its default."""
        return [
            f"{name}: {words}"
            for name, policy in self.policies.items()
            for term in getattr(policy, "terms", [])
            for words in get(term.name).unusual(term.parameters)
        ]

    @property
    def registered_name(self) -> str:
        """The registered model's name."""
        return self.registry.name or f"dpo-{self.name}"


def json_schema() -> str:
    """The JSON schema of a recipe, for editors."""
    return json.dumps(Recipe.model_json_schema(), indent=2)
