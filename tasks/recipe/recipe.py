"""The recipe: one YAML file with everything that decides a run, and the checks across its sections."""

import importlib.util
import json
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from dpo_core.config import Config
from dpo_core.data.config import DataConfig
from dpo_core.data.tokens.config import TokenConfig
from dpo_core.errors import RecipeError
from dpo_core.evaluation.config import EvaluateConfig, PromotionConfig, SuitesConfig
from dpo_core.jobs.files import InferenceConfig
from dpo_core.judging.config import JudgeConfig
from dpo_core.methods import dpo
from dpo_core.methods.diffusion_sft import DiffusionSftConfig
from dpo_core.methods.pair_sampling import PairSamplingConfig
from dpo_core.methods.reward import RewardModelConfig
from dpo_core.methods.sft import SftConfig
from dpo_core.models.config import ModelConfig
from dpo_core.models.lora_config import LORA_EXTRA
from dpo_core.objectives import get
from dpo_core.rewards.ensemble import is_ensemble, parts
from dpo_core.scoring.precision import Precision
from expectations.config import GateConfig
from tasks.recipe.diffusion import check_diffusion, refuse_diffusion
from tasks.recipe.policies import (
    CLASSES,
    Policy,
    PolicyFields,
    check_names,
    require_fields_used,
    require_methods,
    training_order,
)
from tasks.recipe.sections import CacheConfig, RegistryConfig, RewardConfig, TrackingConfig
from tasks.recipe.study import PlannedPolicy, StudyConfig, check_study, nodes


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
    """The base model."""
    data: DataConfig
    """Preference pairs, unpaired rows (answers labelled desirable or undesirable), or prompts."""
    gate: GateConfig = GateConfig()
    """The data gate."""
    tokens: TokenConfig = TokenConfig()
    """From text to tokens."""
    sft: SftConfig = SftConfig()
    """Preparation of the reference by supervised fine-tuning."""
    diffusion_sft: DiffusionSftConfig | None = Field(None, exclude_if=lambda settings: settings is None)
    """Preparation of the reference of a diffusion model, in place of `sft`. Empty: the model itself."""
    pairs: PairSamplingConfig = PairSamplingConfig()
    """Sampling pairs; read only when the data has prompts but no pairs."""
    reward: RewardConfig = RewardConfig()
    """The reward of completions."""
    cache: CacheConfig = CacheConfig()
    """Computation of reference log-probs."""
    policies: Annotated[dict[str, Policy], BeforeValidator(require_methods)] = Field(
        default_factory=lambda: {"DPO": CLASSES[dpo.METHOD.name](method=dpo.METHOD.name)}, min_length=1
    )
    """The policies to train, by name; see `dpo methods`."""
    candidate: str | None = Field(None, min_length=1)
    """The policy that is registered and may be promoted. Empty: the first."""
    study: StudyConfig | None = None
    """Makes the run a study: it compares the policies over a grid of settings and seeds."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation on held-out prompts."""
    inference: InferenceConfig = InferenceConfig()
    """Ranks of the jobs that import, sample, score and evaluate; each training has its own in `engine`."""
    suites: SuitesConfig = SuitesConfig()
    """Evaluation suites: preferences, capabilities, harm."""
    judge: JudgeConfig | None = None
    """A language model that decides which policy's answers are better. Empty: only the reward decides."""
    promotion: PromotionConfig = PromotionConfig()
    """The rules for a promotion."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    registry: RegistryConfig = RegistryConfig()
    """The model registry."""

    @model_validator(mode="after")
    def _check_policies(self) -> "Recipe":
        check_names(self.policies)
        training_order(self.policies)
        require_fields_used(self.policies, known_reward=self.reward.source is not None)
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
    def _check_sections(self) -> "Recipe":
        if not self.trains_reward_model and self.reward.model != RewardModelConfig():
            raise ValueError(
                "reward.model has no effect, because reward.source gives a known reward and no policy has "
                "reward: model. Remove it"
            )
        if self.data.openings is not None or self.data.scenes is not None:
            if self.reward.source is None:
                raise ValueError(
                    "reward.source is needed: the data has prompts only, and a known reward labels samples"
                )
            if self.fine_tunes and self.sft.reads_answers:
                made = "made_demonstrations" if self.data.scenes is None else "made_scenes"
                raise ValueError(
                    f"SFT has nothing to learn from: set sft.demonstrations (a file), sft.{made} "
                    "(a number), or sft.enabled to false"
                )
        if not self.sft.enabled and self.sft != SftConfig(enabled=False):
            raise ValueError(
                "sft.* has no effect, because sft.enabled is false. Delete the other fields under sft, or "
                "override the whole section: --set 'sft={enabled: false}'"
            )
        if self.sft.lora and importlib.util.find_spec("peft") is None:
            raise ValueError(f"sft.lora needs peft, which is not installed: {LORA_EXTRA}")
        for name in ("pairs", "evaluate"):
            new = getattr(self, name).sampling.max_new_tokens
            if new >= self.tokens.max_length:
                raise ValueError(f"{name}.sampling.max_new_tokens {new} leaves no room in tokens.max_length")
        return self

    @model_validator(mode="after")
    def _check_ensemble(self) -> "Recipe":
        source = self.reward.source or ""
        try:
            parts(source)
        except RecipeError as error:
            raise ValueError(f"reward.source: {error}") from error
        if not is_ensemble(source):
            return self
        if self.study is not None:
            raise ValueError(
                "reward.source is an ensemble, whose rewards compare the samples of one prompt only, and a "
                "study compares rewards of policies that are evaluated apart. Name one reward"
            )
        for name, policy in self.policies.items():
            one_each = policy.entry.scored and policy.settings.completions_per_prompt == 1
            if one_each or self.learns_from_model(policy):
                raise ValueError(
                    f"policies.{name} needs one reward in reward.source: an ensemble compares the samples of "
                    "one prompt only. Use grpo or online_dpo without reward: model, or name one reward"
                )
        return self

    @model_validator(mode="after")
    def _check_images(self) -> "Recipe":
        samplings = {"pairs": self.pairs.sampling, "evaluate": self.evaluate.sampling}
        samplings["suites.settings"] = self.suites.settings.sampling
        if self.diffusion:
            check_diffusion(self, samplings)
            return self
        refuse_diffusion(self, samplings)
        if self.evaluate.sampling.guidance != 1:
            raise ValueError(
                "evaluate.sampling.guidance would measure the KL of another distribution than the policy's. "
                "Set it in suites.settings.sampling, whose images are only judged, and remove it here"
            )
        if self.data.scenes is None:
            return self
        for name, policy in self.policies.items():
            if rules := getattr(policy, "length_rules", []):
                raise ValueError(
                    f"policies.{name}.{rules[0]} has no effect on images, which all have one length and no "
                    "end. Remove it"
                )
        return self

    @model_validator(mode="after")
    def _check_study_and_judge(self) -> "Recipe":
        if self.study is not None:
            if self.reward.source is None:
                raise ValueError("a study compares true rewards: set reward.source")
            if self.judge:
                raise ValueError("judge has no effect, because a study does not use it. Remove it")
            if self.candidate is not None:
                raise ValueError("candidate has no effect, because a study registers no model. Remove it")
            if self.evaluate.prompts < 2:
                raise ValueError("a study needs intervals over prompts: set evaluate.prompts to 2 or more")
        if self.judge and self.judge.kind != "llm":
            raise ValueError("judge.kind must be llm: a run always measures with its reward")
        return self

    def nodes(self) -> list[PlannedPolicy]:
        """Every training of a policy, each after those that it needs."""
        return list(nodes(self.policies, self.study, self.seed))

    @property
    def candidate_name(self) -> str:
        """The policy that is registered."""
        return self.candidate or next(iter(self.policies))

    @property
    def precision(self) -> Precision:
        """Precision in which the candidate is trained, and models are checked."""
        precision: Precision = self.policies[self.candidate_name].settings.engine.precision
        return precision

    @property
    def diffusion(self) -> bool:
        """True if the policies are diffusion models."""
        return any(policy.entry.model == "denoiser" for policy in self.policies.values())

    @property
    def fine_tunes(self) -> bool:
        """True if a language model is fine-tuned by `sft` to be the reference."""
        return self.sft.enabled and not self.diffusion

    def learns_from_model(self, policy: PolicyFields) -> bool:
        """True if the policy learns from a reward model that is trained on the pairs."""
        return policy.entry.scored and (self.reward.source is None or policy.reward == "model")

    @property
    def trains_reward_model(self) -> bool:
        """True if a reward model is trained."""
        return self.reward.source is None or any(map(self.learns_from_model, self.policies.values()))

    @property
    def margin_by_agreement(self) -> bool:
        """True if the reward model's margins are read from the pairs."""
        return self.trains_reward_model and self.reward.model.margin == "agreement"

    def without_default_parameters(self) -> "Recipe":
        """The recipe without parameters that equal an objective's defaults, as a start for another recipe.

        Written out, they would remain when the objective is changed to one with other defaults.
        """

        def trimmed(part: Any) -> Any:
            if not hasattr(part, "objective") or self.diffusion:  # which has other defaults, not written out
                return part
            own = get(part.objective).parameters
            changed = {name: value for name, value in part.parameters.items() if value != own[name].default}
            changes: dict[str, Any] = {"parameters": changed}
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
