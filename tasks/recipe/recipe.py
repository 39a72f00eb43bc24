"""One recipe = one YAML = one run: what it may say, how overrides are laid over it, what is refused."""

import difflib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from yaml.constructor import ConstructorError

from dpo_core.config import Config
from dpo_core.data.config import DataConfig
from dpo_core.data.tokens.tokenise import TokenConfig
from dpo_core.errors import RecipeError
from dpo_core.evaluation.decision import PromotionConfig
from dpo_core.evaluation.policies import EvaluateConfig
from dpo_core.evaluation.run_suite import SuitesConfig
from dpo_core.judging.judge import JudgeConfig
from dpo_core.methods.dpo import DpoConfig
from dpo_core.methods.grpo import GroupConfig
from dpo_core.methods.online_dpo import OnlineDpoConfig
from dpo_core.methods.pair_sampling import PairSamplingConfig
from dpo_core.methods.ppo import PpoConfig
from dpo_core.methods.reward import RewardModelConfig
from dpo_core.methods.sft import SftConfig
from dpo_core.models.load import ModelConfig
from dpo_core.models.lora import LORA_EXTRA
from dpo_core.objectives import get
from dpo_core.redaction import place_of_secret
from dpo_core.system import read_small
from dpo_core.yaml import read_yaml
from expectations.thresholds import GateConfig
from tasks.recipe.sections import CacheConfig, RegistryConfig, RewardConfig, TrackingConfig
from tasks.recipe.study import ArmConfig, FrontierConfig, Settings

Model = TypeVar("Model", bound=BaseModel)
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
    dpo: DpoConfig = DpoConfig()
    """Preference optimisation."""
    guide: DpoConfig | None = None
    """Pre-DPO: train a model with these settings first and take it as the reference of `dpo`, which starts
    again from the SFT model. Empty: the reference is the SFT model."""
    ppo: PpoConfig = PpoConfig()
    """The PPO baseline."""
    grpo: GroupConfig | None = None
    """GRPO, Dr. GRPO, DAPO, GSPO or RLOO as a further baseline. Empty: none; `grpo: {}` switches it on, and
    `dpo config show` then prints its fields."""
    online: OnlineDpoConfig | None = None
    """Online or iterative DPO beside the others. Empty: none; `online: {}` switches it on, and `dpo config
    show` then prints its fields."""
    frontier: FrontierConfig | None = None
    """A comparison study instead of one alignment: arms, settings and seeds from one SFT reference."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation on held-out prompts."""
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
    def _what_is_set_is_read(self) -> "Recipe":
        if not (self.reward.learned or self.frontier) and self.reward.model != RewardModelConfig():
            raise ValueError(
                "reward.model would not be read: reward.source gives a known reward; reward.optimise=model "
                "lets PPO learn from a reward model all the same"
            )
        if self.reward.source is not None and self.reward.optimise == "model" and not self.ppo.enabled:
            raise ValueError(
                "reward.optimise would not be read: ppo.enabled is false, and evaluation measures with "
                "reward.source"
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
        if not self.ppo.enabled and self.ppo != PpoConfig(enabled=False):
            raise ValueError(f"ppo.* would not be read: ppo.enabled is false. {_ALONE.format('ppo')}")
        for name in ("sft", "dpo"):
            if getattr(self, name).lora and importlib.util.find_spec("peft") is None:
                raise ValueError(f"{name}.lora needs peft, which is not installed: {LORA_EXTRA}")
        self._check_frontier()
        for name in ("pairs", "evaluate"):
            new = getattr(self, name).sampling.max_new_tokens
            if new >= self.tokens.max_length:
                raise ValueError(f"{name}.sampling.max_new_tokens {new} leaves no room in tokens.max_length")
        return self

    @model_validator(mode="after")
    def _what_is_asked_beside_the_reward(self) -> "Recipe":
        if self.frontier and (self.suites.names or self.judge):
            raise ValueError("suites and judge would not be read: a comparison study asks neither")
        if self.judge and self.judge.kind != "llm":
            raise ValueError("judge.kind must be llm: the run measures with its reward anyway")
        return self

    def _check_frontier(self) -> None:
        """Every arm's settings are valid before anything runs, and what they learn from is there."""
        if self.frontier is None:
            return
        if self.reward.source is None:
            raise ValueError("frontier compares true rewards: set reward.source")
        if self.guide is not None or self.reward.optimise != "source":
            raise ValueError(
                "guide and reward.optimise would not be read: the arms of the frontier say guided and reward"
            )
        learned = any(arm.reward == "model" for arm in self.frontier.arms)
        if not learned and self.reward.model != RewardModelConfig():
            raise ValueError("reward.model would not be read: no arm of the frontier has reward: model")
        for arm in self.frontier.arms:
            for setting in arm.settings:
                try:
                    self.arm_config(arm, setting)
                except (ValidationError, RecipeError) as error:
                    what = str(error)
                    if isinstance(error, ValidationError):
                        first = error.errors()[0]
                        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
                    raise ValueError(f"arm '{arm.name}', setting {arm.label(setting)}: {what}") from error

    def arm_config(self, arm: ArmConfig, setting: dict[str, Any]) -> Settings:
        """The settings of an arm's method at one of its points."""
        section = getattr(self, arm.method)
        if arm.method == "ppo" and not section.enabled:
            section = None
        return arm.config(section, setting)

    def online_methods(self) -> list[tuple[Any, Any, Any]]:
        """Of an alignment: (kind of job, name in the tables, settings) of each method that samples."""
        names = {"dr_grpo": "Dr. GRPO"}
        found: list[tuple[Any, Any, Any]] = []
        if self.ppo.enabled:
            found.append(("ppo", "PPO", self.ppo))
        if self.grpo is not None:
            found.append(("grpo", names.get(self.grpo.variant, self.grpo.variant.upper()), self.grpo))
        if self.online is not None:
            found.append(("online", "Online DPO", self.online))
        return found

    def without_default_parameters(self) -> "Recipe":
        """The same recipe, to start another from: parameters that are an objective's defaults are left out.

        Written out, they would stay when the objective is changed to one whose defaults are others.
        """

        def trimmed(part: Any) -> Any:
            own = get(part.objective).parameters
            kept = {name: value for name, value in part.parameters.items() if value != own[name].default}
            changes: dict[str, Any] = {"parameters": kept}
            if plus := getattr(part, "plus", None):
                changes["plus"] = [trimmed(term) for term in plus]
            return part.model_copy(update=changes)

        sections = {name: getattr(self, name) for name in ("guide", "dpo", "online")}
        return self.model_copy(update={name: trimmed(part) for name, part in sections.items() if part})

    @property
    def unusual_parameters(self) -> list[str]:
        """A sentence for each parameter of an objective that is far from its default."""
        sections = {"guide": self.guide, "dpo": self.dpo}
        return [
            f"{section}: {words}"
            for section, config in sections.items()
            for term in (config.terms if config else [])
            for words in get(term.name).unusual(term.parameters)
        ]

    @property
    def registered_name(self) -> str:
        """The registered model's name."""
        return self.registry.name or f"dpo-{self.name}"


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(resources.files("flows"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe or a YAML file and lay `a.b=value` overrides over it.

    Raises:
        RecipeError: unknown recipe, unreadable or malformed YAML, unknown field, value out of range.
    """
    path = _find(name)
    try:
        raw = read_yaml(read_small(path))
    except OSError as error:
        raise RecipeError(f"the recipe {path} cannot be read ({error.strerror})", "Check its path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise RecipeError(
            f"the recipe {path} is not valid YAML: {where}", "Mend the line it names"
        ) from error
    if not isinstance(raw, dict):
        raise RecipeError(f"the recipe {path} is not a mapping of fields", "Start from a shipped recipe")
    return overridden(Recipe, raw, overrides, f"the recipe {name} cannot be used", _KNOWN_FIELDS)


_KNOWN_FIELDS = "See every field and its range with: dpo config schema"


def _find(name: str) -> Path:
    recipes = shipped()
    if name in recipes:
        return recipes[name]
    path = Path(name).expanduser()
    if path.is_dir():
        raise RecipeError(f"{path} is a folder, not a recipe", "Name the YAML file")
    if not path.exists():
        raise RecipeError(
            f"there is no recipe named {name} and no such file",
            f"Shipped recipes: {', '.join(recipes)}; or name a YAML file",
        )
    return path


def overridden(
    model: type[Model], raw: dict[str, Any], overrides: Sequence[str], unusable: str, remedy: str
) -> Model:
    """Settings with `a.b=value` overrides laid over them; `unusable` begins the error if they cannot be used.

    Raises:
        RecipeError: an override of another form, an unknown field, a value out of range.
    """
    for override in overrides:
        _lay_over(raw, override)
    try:
        settings = model.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{unusable}: {_faults_of(error, model)}", remedy) from error
    except RecipeError as error:  # of the objective or the judge, which say themselves what may be chosen
        where = "" if error.problem.startswith("the judge") else "dpo: "
        raise RecipeError(f"{unusable}: {where}{error.problem}", error.remedy) from error
    if place := place_of_secret(raw):
        # MLflow, Prefect, manifests and pages would all show it.
        raise RecipeError(f"{unusable}: {place} holds a secret, which every record would show", _INSTEAD)
    return settings


_INSTEAD = (
    "Take it out; secrets are read from the environment alone: HF_TOKEN, DPO_REWARD_TOKEN, DPO_JUDGE_KEY, "
    "MLFLOW_TRACKING_USERNAME with MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_URI for a database's address"
)


def _lay_over(raw: dict[str, Any], override: str) -> None:
    """Lay one `a.b=value` over a mapping; the value is read as YAML.

    Raises:
        RecipeError: it is not of that form.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"--set {override} is not of the form a.b=value", "Write for example dpo.epochs=2")
    try:
        value = read_yaml(text) if text else None
    except yaml.YAMLError as error:
        said = f"--set {_short(override)}: the value is not valid YAML{_why(error)}"
        raise RecipeError(said, "Quote it") from error
    if isinstance(value, str):
        value = _number(value)
    place = raw
    for part in parts[:-1]:
        inner = place.setdefault(part, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {override}: {part} holds a value, not fields", _KNOWN_FIELDS)
        place[part] = inner = dict(inner)  # where YAML aliases share it, the others keep their values
        place = inner
    place[parts[-1]] = value


def _why(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None)
    return f": {problem}" if isinstance(error, ConstructorError) and problem else ""


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]} …"


def _number(text: str) -> str | float:
    """YAML 1.1 reads 1e-5 as a string; people mean a number."""
    try:
        return float(text) if text[:1] in "0123456789.-+" else text
    except ValueError:
        return text


def _faults_of(error: ValidationError, root: type[BaseModel]) -> str:
    """Every fault with its field, in one line; `root` is the model that was asked."""
    faults = []
    for fault in error.errors():
        field = ".".join(map(str, fault["loc"])) or "recipe"
        if fault["type"] == "extra_forbidden":
            faults.append(f"there is no field {field}{_meant(root, fault['loc'])}")
            continue
        message = fault["msg"].removeprefix("Value error, ")
        given = f" (given {fault['input']!r})" if not isinstance(fault["input"], dict) else ""
        faults.append(f"{field}: {message}{given if len(given) < 80 else ''}")
    return "; ".join(faults)


def _meant(root: type[BaseModel], place: tuple[int | str, ...]) -> str:
    """The field that a mistyped one most likely was to be: its place elsewhere, or the nearest name there."""
    model, wanted = root, _LONG.get(str(place[-1]), str(place[-1]))
    for part in place[:-1]:
        known = model.model_fields.get(str(part))
        inner = _model_of(known.annotation) if known else None
        if inner is None:
            return ""
        model = inner
    near = difflib.get_close_matches(wanted, model.model_fields, n=1)
    elsewhere = [path for path in _paths(root) if path.rpartition(".")[2] == wanted]
    # Most people mean the training of the policy.
    elsewhere.sort(key=lambda path: (not path.startswith("dpo."), path.count("."), path))
    found = near if wanted in near or not elsewhere else elsewhere
    return f" (did you mean {found[0]}?)" if found else ""


# What other trainers call them.
_LONG = {"lr": "learning_rate", "bs": "batch_size", "max_tokens": "max_new_tokens", "lora_config": "lora"}


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, also where it may be empty."""
    kinds = [annotation, *get_args(annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _paths(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """Dotted names of all fields of a model and of its sections."""
    for name, field in model.model_fields.items():
        yield above + name
        inner = _model_of(field.annotation)
        if inner is not None and inner is not model:
            yield from _paths(inner, f"{above}{name}.")


def json_schema() -> str:
    """The JSON schema of a recipe, for editors."""
    return json.dumps(Recipe.model_json_schema(), indent=2)
