"""What a comparison study trains: arms, each a method with its changes to the recipe, at some settings."""

from typing import Any, Literal

from pydantic import Field, model_validator

from dpo_core.config import Config
from dpo_core.methods.dpo import DpoConfig
from dpo_core.methods.grpo import GroupConfig
from dpo_core.methods.online_dpo import OnlineDpoConfig
from dpo_core.methods.ppo import PpoConfig

Method = Literal["dpo", "ppo", "grpo", "online"]
Settings = DpoConfig | PpoConfig | GroupConfig | OnlineDpoConfig
_SECTIONS: dict[Method, type[Settings]] = {
    "dpo": DpoConfig,
    "ppo": PpoConfig,
    "grpo": GroupConfig,
    "online": OnlineDpoConfig,
}


class ArmConfig(Config):
    """One way to align, at one or more settings. Fields have the names of the recipe's section."""

    name: str = Field(min_length=1, max_length=40)
    """What tables call it: DPO, PPO, PPO-GT (with the known reward), TDPO1, f-DPO, "Pre-DPO, few"."""
    method: Method
    """The recipe's section that it starts from: dpo, ppo, grpo or online."""
    base: dict[str, Any] = Field(default_factory=dict)
    """Laid over that section for every setting, `{parameters.beta: 0.1}`."""
    settings: list[dict[str, Any]] = Field(min_length=1)
    """What varies: one dictionary of fields for each point on the frontier."""
    reward: Literal["model", "source"] = "source"
    """What methods that sample learn from: a reward model trained on the pairs, or the known reward."""
    guided: bool = False
    """Pre-DPO: the same training runs first, and its result is the reference of a second one from SFT."""
    drawn: bool = True
    """Whether the figures show it; arms that only answer a claim need not be there."""

    @model_validator(mode="after")
    def _is_read(self) -> "ArmConfig":
        if self.method == "dpo" and self.reward != "source":
            raise ValueError(f"arm '{self.name}' is trained on pairs and reads no reward: leave reward out")
        if self.method != "dpo" and self.guided:
            raise ValueError(f"arm '{self.name}' is not trained on pairs, so that guided is not read")
        return self

    def label(self, setting: dict[str, Any]) -> str:
        """A setting in words: "beta=0.1"; the last parts of the names say enough."""
        return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in setting.items())

    def config(self, section: Settings | None, setting: dict[str, Any]) -> Settings:
        """The method's settings at a point.

        Args:
            section: the recipe's own; the defaults where it has none.

        Raises:
            pydantic.ValidationError: a field is unknown or its value out of range.
        """
        kind = _SECTIONS[self.method]
        fields = (section or kind()).model_dump(mode="json")
        for key, value in {**self.base, **setting}.items():
            *path, last = key.split(".")
            place = fields
            for part in path:
                place = place.setdefault(part, {})
            place[last] = value
        return kind.model_validate(fields)


class FrontierConfig(Config):
    """A comparison study: arms, settings and seeds from one SFT reference, measured on the same prompts."""

    seeds: list[int] = Field([0, 1, 2], min_length=1)
    """Seeds of training: order of examples, sampling, reward model. Data and reference are shared."""
    arms: list[ArmConfig] = Field(min_length=1)
    """What is compared."""
    kl_at: list[float] = Field([2.0, 5.0, 10.0], min_length=1)
    """KLs, in nats, at which rewards are compared; chosen before the results are seen."""
    best_of: list[int] = Field([2, 4, 8, 16])
    """The best of so many samples of the reference, as a line to compare with."""
    parallel: int = Field(1, ge=1)
    """Policies trained at a time; give their engines that share of the cores (`engine.threads`)."""

    @model_validator(mode="after")
    def _names_differ(self) -> "FrontierConfig":
        for what, names in (("arm", [arm.name for arm in self.arms]), ("seed", self.seeds)):
            if len(set(names)) < len(names):
                raise ValueError(f"an {what} is there twice: {names}")
        for arm in self.arms:
            labels = [arm.label(setting) for setting in arm.settings]
            if len(set(labels)) < len(labels):
                raise ValueError(f"arm '{arm.name}' has a setting twice: {labels}")
        return self
