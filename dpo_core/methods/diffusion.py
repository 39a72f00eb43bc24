"""The method `diffusion`: the objectives on denoising errors of a diffusion model; its settings and data."""

from typing import Literal

from pydantic import Field, model_validator

from dpo_core.methods.method import GRADIENT, LOSS, Method, Panel
from dpo_core.models.lora_config import LoraConfig
from dpo_core.objectives import Objective, ObjectiveName, Term, get
from dpo_core.training.config import EngineConfig, LoopConfig, OptimConfig

DISPLACED_ERROR = 1.2
"""Beyond this ratio of the policy's error to the reference's, chosen images have become less likely."""


class DiffusionConfig(LoopConfig):
    """Preference optimisation of a diffusion model, on pairs of images or on single ones.

    A denoising error takes the place of a log-prob: h = -½·kappa·(policy's error - reference's), with errors
    summed over an image. Objectives on single answers read labelled images, or both sides of pairs.
    """

    objective: ObjectiveName = "dpo"
    """A name from `dpo objectives`: dpo is Diffusion-DPO, kto Diffusion-KTO."""
    parameters: dict[str, float] = Field(default_factory=dict)
    """Parameters of the objective. The one that scales rewards (beta, tau) is 1 here: kappa scales them."""
    kappa: float = Field(0.3, gt=0, le=1e4)
    """Nats for half a unit of squared error, summed over an image; larger stays closer to the reference. The
    5000 of Diffusion-DPO's code is on means, and is 0.305 on sums over 4 x 64 x 64 latents."""
    draws: int = Field(8, ge=1)
    """Fixed noises and noise levels of each example. An epoch uses one, and after the last the first comes
    again, with the reference's errors already computed."""
    reference_errors: Literal["cached", "live"] = "cached"
    """cached: the reference's errors of all draws are computed before the first step. live: the reference
    stays in memory and runs in each step, which is slower and needs no pass before."""
    optim: OptimConfig = OptimConfig(learning_rate=1e-5)
    """Optimiser and schedule."""
    engine: EngineConfig = EngineConfig()
    """Precision, ZeRO stage, ranks, checkpoints."""
    lora: LoraConfig | None = None
    """Train only LoRA weights, which are merged into the result; empty: train all weights."""
    limit: int | None = Field(None, ge=1)
    """Largest number of pairs to train on: a seeded sample. Empty: all."""
    check_rows: int = Field(8, ge=0)
    """Examples whose errors are compared with the reference's before the first step."""

    @model_validator(mode="after")
    def _fits(self) -> "DiffusionConfig":
        if self.objective_entry.extras:
            extras = ", ".join(sorted(self.objective_entry.extras))
            raise ValueError(f"objective '{self.objective}' reads tokens ({extras}), and images have none")
        if self.engine.zero_stage == 3:
            raise ValueError("diffusion trains with zero_stage 0 to 2")
        if self.engine.compile:
            raise ValueError("diffusion does not compile layers: leave engine.compile out")
        _ = self.term
        return self

    @property
    def objective_entry(self) -> Objective:
        """The registered objective."""
        return get(self.objective)

    @property
    def term(self) -> Term:
        """The objective with every parameter filled in."""
        entry = self.objective_entry
        scale = {entry.reward_scale: 1.0} if entry.reward_scale else {}
        return Term(self.objective, 1.0, entry.resolve(scale | self.parameters))

    @property
    def terms(self) -> list[Term]:
        """The objective in words: without the scale of rewards, unless it is set."""
        entry = self.objective_entry
        silent = entry.reward_scale if entry.reward_scale not in self.parameters else None
        named = {name: value for name, value in self.term.parameters.items() if name != silent}
        return [Term(self.objective, 1.0, named)]

    @property
    def on_pairs(self) -> bool:
        """Whether the objective compares the two images of a pair."""
        return self.objective_entry.data == "pairs"


def _examples(settings: DiffusionConfig, pairs: int) -> int:
    """Objectives on single images learn from both of a pair."""
    return settings.steps(pairs if settings.on_pairs else 2 * pairs)


METHOD = Method(
    name="diffusion",
    title="Preference optimisation of image diffusion models, by denoising errors",
    citation="Wallace et al. 2023, arXiv 2311.12908; Li et al. 2024, arXiv 2404.04465",
    settings=DiffusionConfig,
    data="pairs",
    curves=(
        LOSS,
        Panel(
            "Denoising error",
            "policy / reference",
            (("error/chosen", "chosen"), ("error/rejected", "rejected")),
            1.0,
        ),
        Panel("Reward margin", "nats", (("rewards/margins", "margin"),), 0.0),
        Panel("Preference accuracy", "share of pairs", (("rewards/accuracies", "accuracy"),), 0.5),
        GRADIENT,
    ),
    model="denoiser",
    reference=lambda settings: "live" if settings.reference_errors == "live" else "errors",
    total_steps=_examples,
)
