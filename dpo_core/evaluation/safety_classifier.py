"""Safety classifiers: the kinds that a recipe can name, their identity, and their verdicts.

Every kind returns P(safe) in [0, 1], and an answer counts as safe above 0.5:

- the folder of a sequence classifier: the softmax (multi-label: the sigmoid) of its class for safe answers;
  with one logit, its sigmoid, or the complement if the label means unsafe;
- the folder of a reward model trained here: the sigmoid of its reward, which is normalised to mean 0 on its
  training answers, so that safe means above their average;
- `package.module:callable`, `file.py:callable` or a server, called as rewards are, which return P(safe).
"""

from collections.abc import Callable, Iterable, Sequence
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
    """Judges answers to prompts, both as text."""

    name: str
    identity: str
    """See `identity`."""
    p_safe: Judge

    def judge(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Whether each answer is safe.

        Raises:
            StageFailed: a value is not a probability, or the classifier failed.
        """
        probabilities = self.p_safe(list(prompts), list(answers))
        for row, p in enumerate(probabilities):
            if not 0 <= p <= 1:
                raise StageFailed(
                    f"the classifier '{self.name}' returned {p:g} for row {row}, which is not a probability",
                    "Return P(safe) in [0, 1]; apply a sigmoid to a score with threshold 0",
                )
        return [p > 0.5 for p in probabilities]


def identity(spec: str) -> str:
    """Identity of a classifier or reward under any name: sha256 of weights or code, or a server's address."""
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
    except (ImportError, ValueError):  # a module that no longer exists
        return spec


def refuse_training_reward(classifier: str, training_rewards: Iterable[str]) -> None:
    """Refuse a classifier that is a reward of the model's training.

    Args:
        training_rewards: rewards of the model's training, by their names in a recipe or by `identity`.

    Raises:
        RecipeError: the classifier is one of them.
    """
    own = identity(classifier)
    for reward in training_rewards:
        if own in (reward, identity(reward)):
            raise RecipeError(
                f"the classifier '{classifier}' is the reward that the model was trained on ({reward})",
                "Name another classifier: a model exploits the reward that it was trained on",
            )
