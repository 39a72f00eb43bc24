"""What a method declares: settings, data, reference, curves."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Data = Literal["demonstrations", "pairs", "unpaired", "prompts"]
Reference = Literal["none", "cached", "live"]


class Panel(NamedTuple):
    """Metrics that share one pair of axes."""

    title: str
    unit: str
    metrics: tuple[tuple[str, str], ...]
    """(metric, label), two at most."""
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
    Panel("Completion length", "tokens", (("completions/mean_length", "length"),)),
    GRADIENT,
)
"""Of methods that train on their own samples; a panel without metrics of the method is not drawn."""


def _no_reference(settings: Any) -> Reference:
    return "none"


@dataclass(frozen=True)
class Method:
    """A way to train. `dpo methods` lists those that a policy may name; `trainers` has a module of its name.

    `settings` is a pydantic class with `optim` and `engine`; the functions are given a value of it.
    """

    name: str
    title: str
    citation: str
    settings: type[Any]
    data: Data
    """What it learns from. Pairs can also be taken apart into unpaired rows."""
    curves: tuple[Panel, ...]
    version: int = 1
    """Of its training stage: raised, it trains again everywhere."""
    retired: Mapping[str, Any] = field(default_factory=dict)
    """Settings that it no longer has, with their one value: part of the stage's key, so that earlier results
    are found."""
    policy: bool = True
    """False: it serves the run (reference, reward model) and is no policy of its own."""
    artifact: Literal["model", "reward-model"] = "model"
    scored: bool = False
    """Whether a reward scores what it samples."""
    reference: Callable[[Any], Reference] = _no_reference
    """How settings read the reference: not, from cached log-probs, or as a model in memory."""
    total_steps: Callable[[Any, int], int] = field(default=lambda settings, rows: settings.steps(rows))
    """Lines of the curve of a training on so many rows."""

    @property
    def stage(self) -> str:
        """The name of its training stage."""
        return f"train-{self.name}"

    def needs(self, settings: Any) -> list[str]:
        """In words: data, reference, reward."""
        reference = {"none": [], "cached": ["cached reference log-probs"], "live": ["reference in memory"]}
        return [self.data, *reference[self.reference(settings)], *(["reward"] if self.scored else [])]
