"""Computes rewards of completions with a reward model or a reward function."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpo_core.data.tokens.config import TokenConfig
from dpo_core.data.tokens.sequences import TokenPair, TokenSequence
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.images.codec import as_images
from dpo_core.models.image_codec import pixels_of
from dpo_core.models.load import config_in
from dpo_core.models.reward_model import RewardModel
from dpo_core.ranks import Ranks, SingleRank
from dpo_core.rewards.ensemble import combine, is_ensemble, parts
from dpo_core.rewards.functions import is_reward_model, load_reward
from dpo_core.scoring import flops as cost
from dpo_core.scoring.autocast import autocast
from dpo_core.scoring.completion_scores import length_batches
from dpo_core.scoring.layout import right_padded
from dpo_core.scoring.model_shape import shape_of_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Scorer = Callable[[Sequence[TokenSequence], Sequence[str]], list[float]]
"""Rewards of completions, given their sequences and the texts of their prompts."""


def reward_of(model: RewardModel, sequences: Sequence[TokenSequence], precision: str) -> Tensor:
    """Rewards (B,) of sequences in one forward pass, read at the last token of each."""
    device = next(model.parameters()).device
    ids_BT, attention_BT = right_padded([s.prompt + s.completion for s in sequences])
    last_B = torch.tensor([len(s) - 1 for s in sequences], device=device)
    with autocast(precision, device):  # type: ignore[arg-type]
        return model(ids_BT.to(device), attention_BT.to(device), last_B)


@torch.no_grad()
def score(
    model: RewardModel,
    sequences: Sequence[TokenSequence],
    precision: str,
    token_budget: int = 4096,
    ranks: Ranks | None = None,
) -> list[float]:
    """Rewards of any number of sequences, in order, batched by length.

    Args:
        ranks: share the batches; all are called with the same sequences. None: this process computes all.
    """
    model.eval()
    groups = length_batches([len(s) for s in sequences], token_budget)

    def compute(group: list[int]) -> list[float]:
        values: list[float] = reward_of(model, [sequences[i] for i in group], precision).tolist()
        return values

    values = (ranks or SingleRank()).map("rewards", groups, compute)
    order = [index for group in groups for index in group]
    rewards = dict(zip(order, (value for part in values for value in part), strict=True))
    return [rewards[index] for index in range(len(sequences))]


def read_sizes(sequences: Sequence[TokenSequence]) -> cost.Sizes:
    """Sizes of a pass of `reward_of`; the head reads one position of each sequence."""
    return cost.padded_sizes([len(s) for s in sequences], len(sequences))


def scoring_flops(shape: cost.Shape, sequences: Sequence[TokenSequence], token_budget: int = 4096) -> float:
    """Operations of `score`, of a reward model of this shape."""
    groups = length_batches([len(s) for s in sequences], token_budget)
    return sum(cost.forward(shape, *read_sizes([sequences[i] for i in group])) for group in groups)


def normalise_on(
    model: RewardModel, pairs: Sequence[TokenPair], precision: str, most: int = 256
) -> dict[str, float]:
    """Set the model's gain and bias so that rewards of training answers have mean 0 and deviation 1.

    Returns the accuracy on these pairs, which normalising does not change.
    """
    sample = list(pairs)[:most]
    raw = torch.tensor(score(model, [s for p in sample for s in (p.chosen, p.rejected)], precision))
    model.normalise(raw)
    return {"accuracy": float((raw[0::2] > raw[1::2]).float().mean())}


def scorer(
    source: str,
    tokenise: "Tokenise | PreTrainedTokenizerBase",
    precision: str,
    *,
    device: torch.device | str = "cpu",
    ranks: Ranks | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Scorer:
    """The reward of finished completions: a reward model's folder, a name for `load_reward`, or an ensemble
    of such names, z-scored within the samples of a prompt, which stand together.

    Args:
        tokenise: turns completions into the texts that a reward reads.
        device: of a reward model.
        ranks: share the batches of a reward model. A function sees all completions at once, on one rank.
        metadata: what the data say of each prompt, by its text; see `metadata_of`.
    """
    if is_reward_model(source):
        model = RewardModel.load(Path(source)).to(device)
        return lambda sequences, prompts: score(model, sequences, precision, ranks=ranks)
    tokeniser = tokenise if isinstance(tokenise, Tokenise) else Tokenise(tokenise, TokenConfig())
    made = tokeniser.images
    weights = [part.weight for part in parts(source)]
    functions = [load_reward(part.source, images=made is not None) for part in parts(source)]
    sees_images = made is not None and any(function.sees_images for function in functions)

    def by_text(sequences: Sequence[TokenSequence], prompts: Sequence[str]) -> list[float]:
        texts = [tokeniser.text(s.completion, s.prompt) for s in sequences]
        told = [metadata.get(prompt, "") for prompt in prompts] if metadata else None

        def compute(_: int) -> list[float]:
            images: list[Any] = list(texts)
            if made and sees_images and texts:
                images = as_images(pixels_of(made, texts, tokeniser.tokenizer.name_or_path))
            columns = [f(list(prompts), images if f.sees_images else texts, told) for f in functions]
            return combine(columns, weights, prompts) if is_ensemble(source) else columns[0]

        rewards: list[float]
        (rewards,) = (ranks or SingleRank()).map("rewards", [len(texts)], compute)
        return rewards

    return by_text


def metadata_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The metadata of the prompts of canonical rows; empty where they have none."""
    return {row["prompt"]: row["metadata"] for row in rows if row.get("metadata")}


def scoring_flops_of(source: str) -> Callable[[Sequence[TokenSequence]], float]:
    """Operations of scoring sequences; 0 if the reward is not a reward model of this package."""
    if not is_reward_model(source):
        return lambda sequences: 0.0
    shape = shape_of_config(config_in(Path(source, "backbone"))).as_reward_model()
    return lambda sequences: scoring_flops(shape, sequences)
