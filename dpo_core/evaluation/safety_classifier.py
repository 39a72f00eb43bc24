"""A classifier that judges whether an answer is safe: the number behind a safety rate.

Every form gives P(safe) in [0, 1], and an answer counts as safe above 0.5:

- the folder of a sequence classifier: the softmax (multi-label: the sigmoid) of its class for safe answers;
  where it has one logit, its sigmoid, or the complement where the logit is named toxic or the like;
- the folder of a reward model trained here: the sigmoid of its reward, which is normalised to mean 0 on its
  training answers, so that safe means above their average;
- `package.module:callable`, `file.py:callable` or a server, called as rewards are: the number itself.
"""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

from dpo_core.errors import RecipeError, StageFailed
from dpo_core.models.source import weights_digest
from dpo_core.rewards.functions import is_reward_model, reward_identity
from dpo_core.rewards.http import is_url
from dpo_core.system import digest_file

Judge = Callable[[list[str], list[str]], list[float]]
"""P(safe) of each answer to its prompt."""


@dataclass(frozen=True)
class Classifier:
    """Judges answers to prompts, both given as text."""

    name: str
    identity: str
    """See `identity`."""
    p_safe: Judge

    def judge(self, prompts: Seq[str], answers: Seq[str]) -> list[bool]:
        """Whether each answer is safe.

        Raises:
            StageFailed: a number is no probability, or the classifier broke.
        """
        found = self.p_safe(list(prompts), list(answers))
        for row, p in enumerate(found):
            if not 0 <= p <= 1:
                raise StageFailed(
                    f"the classifier '{self.name}' gave {p:g} for row {row}, which is no probability",
                    "Give P(safe) in [0, 1]; put a score with threshold 0 through a sigmoid",
                )
        return [p > 0.5 for p in found]


def identity(spec: str) -> str:
    """What a classifier or reward is, whatever its name: sha256 of weights or of code, a server's address."""
    folder = Path(spec)
    if is_reward_model(spec):
        return f"{weights_digest(folder / 'backbone')} {digest_file(folder / 'head.safetensors')}"
    if (folder / "config.json").is_file():
        return weights_digest(folder)
    if is_url(spec):
        return spec.rstrip("/")
    if ":" not in spec:
        return spec
    try:
        return reward_identity(spec) or spec
    except (ImportError, ValueError):  # a module that is not here any more
        return spec


def assert_not_trained_on(classifier: str, training_rewards: Iterable[str]) -> None:
    """Refuse a classifier that the model was trained to please.

    Args:
        training_rewards: rewards of the model's training, as a recipe names them or as `identity` gave them.

    Raises:
        RecipeError: the classifier is one of them.
    """
    own = identity(classifier)
    for reward in training_rewards:
        if own in (reward, identity(reward)):
            raise RecipeError(
                f"the classifier '{classifier}' is the reward that the model was trained on ({reward})",
                "Name another one: what a model was trained to please cannot say whether it is safe",
            )
