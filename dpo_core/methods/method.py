"""`Method`, the declaration of a training method: settings, data, reference, curves on the run page."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Data = Literal["demonstrations", "pairs", "unpaired", "prompts"]
Reference = Literal["none", "cached", "live", "errors"]


class Panel(NamedTuple):
    """A plot of metrics on the run page."""

    title: str
    unit: str
    metrics: tuple[tuple[str, str], ...]
    """(metric, label), at most two."""
    baseline: float | None = None
    """A value to compare with: 0 for a margin, 0.5 for an accuracy, 1 for a ratio."""


LOSS = Panel("Loss", "", (("loss", "loss"),))
GRADIENT = Panel("Gradient norm", "", (("grad_norm", "gradient norm"),))
PREFERENCE = (
    LOSS,
    Panel(
        "Implicit rewards", "nats × β", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")), 0.0
    ),
    Panel("Reward margin", "nats × β", (("rewards/margins", "margin"),), 0.0),
    Panel("Preference accuracy", "share of pairs", (("rewards/accuracies", "accuracy"),), 0.5),
    Panel("Log-probability of chosen", "nats", (("logps/chosen", "log p(chosen)"),)),
    GRADIENT,
)
ROUNDS = (
    Panel(
        "Score", "reward", (("objective/scores", "score"), ("objective/rlhf_reward", "score minus KL cost"))
    ),
    Panel("Known reward, not trained on", "reward", (("objective/gold_scores", "known reward"),)),
    Panel("KL to the reference", "nats", (("objective/kl", "KL"),), 0.0),
    Panel("Probability ratio", "new / old", (("val/ratio", "ratio"),), 1.0),
    Panel("Approximate KL of an update", "nats", (("policy/approxkl_avg", "KL"),), 0.0),
    Panel("Reward", "reward", (("reward", "reward"),)),
    Panel("KL to the reference", "nats", (("kl", "KL"),), 0.0),
    Panel("KL of guided sampling", "nats a token", (("sampling/guided_kl", "KL(guided‖policy)"),), 0.0),
    Panel("Completion length", "tokens", (("completions/mean_length", "length"),)),
    GRADIENT,
)
"""Panels of methods that train on their own samples; one whose metrics the method lacks is not drawn."""


def _no_reference(settings: Any) -> Reference:
    return "none"


@dataclass(frozen=True)
class Method:
    """A training method. `dpo methods` lists those that a policy may name; its trainer is in `trainers`.

    `settings` is a pydantic class with `optim` and `engine`; the functions below take a value of it.
    """

    name: str
    title: str
    citation: str
    settings: type[Any]
    data: Data
    """The data that it learns from. Pairs can also be split into unpaired rows."""
    curves: tuple[Panel, ...]
    model: Literal["language", "denoiser"] = "language"
    """The kind of model that it trains."""
    version: int = 1
    """Version of its training stage; when it is raised, cached results are not used."""
    retired: Mapping[str, Any] = field(default_factory=dict)
    """Former settings with their only remaining value. They stay in the stage's key, so that earlier results
    are still used."""
    policy: bool = True
    """False: a recipe's policies cannot name it. It trains the reference or the reward model of a run, or is
    run as a job of its own."""
    artifact: Literal["model", "reward-model"] = "model"
    scored: bool = False
    """Whether a reward scores what it samples."""
    reference: Callable[[Any], Reference] = _no_reference
    """How the reference is read: not at all, from cached log-probs, as a model in memory, or by the training
    itself, which computes its denoising errors before the first step."""
    total_steps: Callable[[Any, int], int] = field(default=lambda settings, rows: settings.steps(rows))
    """Number of lines that a training on a number of rows writes to its metrics file."""

    @property
    def stage(self) -> str:
        """The name of its training stage."""
        return f"train-{self.name}"

    def needs(self, settings: Any) -> list[str]:
        """The data, reference and reward that it needs, for display."""
        reference = {
            "none": [],
            "cached": ["cached reference log-probs"],
            "live": ["reference in memory"],
            "errors": ["errors of the reference"],
        }
        return [self.data, *reference[self.reference(settings)], *(["reward"] if self.scored else [])]
