"""Objectives on pairs without a reference. Each docstring says whether log-probs are sums or means."""

from typing import TYPE_CHECKING

from dpo_core.objectives.common import SMOOTHING, chosen_nll, log1mexp, log_sigmoid, smoothed, token_means
from dpo_core.objectives.inputs import PairLogps, required
from dpo_core.objectives.parameter import Parameter
from dpo_core.objectives.registry import objective

if TYPE_CHECKING:
    from torch import Tensor

# A mean log-prob of 0 has infinite odds; this is the nearest to 0 that float32 resolves in 1 - e^x.
_LARGEST_MEAN = -1e-7


@objective(
    citation="Xu et al., Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in "
    "Machine Translation, ICML 2024, arXiv 2401.08417",
    parameters={
        "beta": Parameter(0.1, 0.001, 10.0, "scale of the difference of log-probs"),
        "nll_weight": Parameter(1.0, 0.0, 100.0, "weight of the chosen NLL; TRL's cpo_alpha"),
        "label_smoothing": SMOOTHING,
    },
    value_at_reference=None,
    needs_reference=False,
)
def cpo(logps: PairLogps, *, beta: float, nll_weight: float, label_smoothing: float) -> "Tensor":
    """-log σ(beta·(log π(y_w) - log π(y_l))) + nll_weight·NLL(y_w) of each pair (B,): CPO, as in TRL.

    The contrast is on SUMS, so it depends on the difference of lengths; the NLL is the mean over the chosen
    completions' TOKENS of the global batch (see `sft`). Smoothing is cDPO's. Without the NLL it is DPO with a
    reference that gives both sides the same probability.
    """
    contrast_B = smoothed(beta * (logps.chosen_B - logps.rejected_B), label_smoothing)
    return contrast_B + nll_weight * chosen_nll(logps)


@objective(
    citation="Meng, Xia, Chen, SimPO: Simple Preference Optimization with a Reference-Free Reward, "
    "NeurIPS 2024, arXiv 2405.14734",
    parameters={
        "beta": Parameter(2.0, 0.1, 100.0, "scale of the difference of mean log-probs"),
        "gamma_beta_ratio": Parameter(0.5, 0.0, 5.0, "target margin as a share of beta: gamma / beta"),
    },
    value_at_reference=None,
    needs_reference=False,
    rewards_per_token=True,
)
def simpo(logps: PairLogps, *, beta: float, gamma_beta_ratio: float) -> "Tensor":
    """-log σ(beta·(log π(y_w)/n_w - log π(y_l)/n_l - gamma_beta_ratio)) of each pair (B,): SimPO, on MEANS.

    The parameter is gamma/beta, as in the authors' repository and open-instruct. The paper's formula, TRL's
    `simpo_gamma` and LLaMA-Factory have gamma itself: divide it by beta. No term keeps the policy near its
    start; TRL's CPO trainer adds an NLL with weight 1 by default.
    """
    chosen_B, rejected_B = token_means(logps)
    return -log_sigmoid(beta * (chosen_B - rejected_B - gamma_beta_ratio))


_ORPO = (
    "Hong, Lee, Thorne, ORPO: Monolithic Preference Optimization without Reference Model, EMNLP 2024, "
    "arXiv 2403.07691"
)
_ODDS_WEIGHT = Parameter(0.1, 0.0, 100.0, "the paper's λ, weight of the odds-ratio term; TRL calls it beta")


def log_odds_ratio(logps: PairLogps) -> "Tensor":
    """log of odds(y_w)/odds(y_l) (B,), odds = P/(1-P), P = exp(MEAN token log-prob).

    Means are clipped at -1e-7, where the odds would overflow: a memorised completion has no gradient.
    """
    chosen_B, rejected_B = (mean_B.clamp(max=_LARGEST_MEAN) for mean_B in token_means(logps))
    return (chosen_B - log1mexp(chosen_B)) - (rejected_B - log1mexp(rejected_B))


@objective(
    citation=_ORPO,
    parameters={"odds_weight": _ODDS_WEIGHT},
    value_at_reference=None,
    needs_reference=False,
    reward_scale="odds_weight",
    rewards_per_token=True,
)
def orpo(logps: PairLogps, *, odds_weight: float) -> "Tensor":
    """NLL(y_w) - λ·log σ(log-odds ratio) of each pair (B,), λ = odds_weight; NLL over the COMPLETION.

    The paper's formula: its NLL is of the chosen answer given the prompt, here the mean over the chosen
    completions' tokens of the global batch. `orpo_full` is what the authors' code and TRL compute. λ = 0 is
    SFT.
    """
    return chosen_nll(logps) - odds_weight * log_sigmoid(log_odds_ratio(logps))


@objective(
    citation=_ORPO,
    parameters={"odds_weight": _ODDS_WEIGHT},
    value_at_reference=None,
    needs_reference=False,
    extras={"prompt"},
    reward_scale="odds_weight",
    rewards_per_token=True,
)
def orpo_full(logps: PairLogps, *, odds_weight: float) -> "Tensor":
    """NLL(x, y_w) - λ·log σ(log-odds ratio) of each pair (B,); NLL over PROMPT and chosen completion.

    As TRL's ORPO trainer and the authors' code: one mean over all these tokens of the global batch, the first
    prompt token left out because nothing predicts it. The odds are over the completion, as in `orpo`.
    """
    return _full_nll(logps) - odds_weight * log_sigmoid(log_odds_ratio(logps))


def _full_nll(logps: PairLogps) -> "Tensor":
    nll_B = -(required(logps, "prompt_B") + logps.chosen_B)
    totals = logps.totals
    if totals is None:
        tokens_B = required(logps, "prompt_tokens_B") + logps.chosen_tokens_B
        return nll_B * len(nll_B) / tokens_B.sum().clamp(min=1)
    return nll_B * totals.pairs / (totals.prompt_tokens + totals.chosen_tokens)
