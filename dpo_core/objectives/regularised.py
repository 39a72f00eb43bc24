"""DPO with an additional term against a known failure, and the NLL terms of weighted sums.

Log-probs are SUMS over the completion (see `inputs.py`).
"""

from typing import TYPE_CHECKING

from dpo_core.objectives.common import BETA, chosen_nll, log_sigmoid, token_means
from dpo_core.objectives.inputs import PairLogps, required
from dpo_core.objectives.parameter import Parameter
from dpo_core.objectives.registry import objective

if TYPE_CHECKING:
    from torch import Tensor


@objective(
    citation="Pal, Karkhanis, Dooley, Roberts, Naidu, White, Smaug: Fixing Failure Modes of Preference "
    "Optimisation with DPO-Positive, 2024, arXiv 2402.13228",
    parameters={
        "beta": BETA,
        "penalty": Parameter(50.0, 0.0, 1000.0, "the paper's λ: cost of making a chosen answer less likely"),
    },
    caveat="The formula and the default of penalty were not checked against the paper's text.",
)
def dpop(logps: PairLogps, *, beta: float, penalty: float) -> "Tensor":
    """-log σ(beta·(D - λ·max(0, -h_w))) of each pair (B,), λ = penalty: the paper's DPO-Positive.

    The term acts only while π(y_w) < π_ref(y_w). At h_w = 0 exactly, where training starts, the slope of the
    maximum is taken as 0: the first gradient is DPO's. λ = 0 is DPO.
    """
    lost_B = (-logps.chosen_ratio_B).relu()
    return -log_sigmoid(beta * (logps.margin_B - penalty * lost_B))


@objective(
    citation="Park, Rafailov, Ermon, Finn, Disentangling Length from Quality in Direct Preference "
    "Optimization, Findings of ACL 2024, arXiv 2403.19159",
    parameters={
        "beta": BETA,
        "alpha": Parameter(0.01, 0.0, 1.0, "reward taken off for each token of a completion"),
    },
    # At the reference it is -log σ(α·(n_w - n_l)): it depends on the pairs.
    value_at_reference=None,
    caveat="The default of alpha is not the paper's.",
)
def r_dpo(logps: PairLogps, *, beta: float, alpha: float) -> "Tensor":
    """-log σ(beta·D + α·(n_w - n_l)) of each pair (B,), n = completion tokens: the paper's R-DPO.

    The sign is PLUS: with α·n taken off the reward, a longer chosen answer explains part of the preference
    and less margin is asked of it. α = 0 is DPO.
    """
    longer_B = (logps.chosen_tokens_B - logps.rejected_tokens_B).to(logps.chosen_B.dtype)
    return -log_sigmoid(beta * logps.margin_B + alpha * longer_B)


@objective(
    citation="Liu et al., Length Desensitization in Direct Preference Optimization, 2024, arXiv 2409.06411",
    parameters={
        "beta": BETA,
        "alpha": Parameter(0.5, 0.0, 1.0, "weight of the tokens beyond the shorter answer's length"),
    },
    extras={"common"},
)
def ld_dpo(logps: PairLogps, *, beta: float, alpha: float) -> "Tensor":
    """-log σ(beta·D') of each pair (B,); in D' tokens past min(n_w, n_l) weigh α: the paper's LD-DPO.

    Applied to policy AND reference, as TRL does. LLaMA-Factory and ms-swift weigh the policy only, which is
    not ln 2 at the reference. α = 1 is DPO.
    """
    chosen_B = required(logps, "chosen_common_B") - required(logps, "ref_chosen_common_B")
    rejected_B = required(logps, "rejected_common_B") - required(logps, "ref_rejected_common_B")
    common_B = chosen_B - rejected_B
    return -log_sigmoid(beta * (common_B + alpha * (logps.margin_B - common_B)))


_NLL = (
    "Pang et al., Iterative Reasoning Preference Optimization, NeurIPS 2024, arXiv 2404.19733; "
    "Wang et al., Mixed Preference Optimization, 2024, arXiv 2411.10442"
)


@objective(
    citation=_NLL,
    parameters={},
    value_at_reference=None,
    needs_reference=False,
    reward_scale=None,
)
def sft(logps: PairLogps) -> "Tensor":
    """Each pair's part (B,) of the NLL of the chosen completions; its mean over pairs is Σ-log π / Σ tokens.

    TRL `sft`: a mean over the TOKENS of the batch, here of the global one; `sft_mean` is Pang et al.'s. Meant
    as a term of a weighted sum: dpo + α·sft is RPO, with bco_pair too MPO.
    """
    return chosen_nll(logps)


@objective(
    citation=_NLL,
    parameters={},
    value_at_reference=None,
    needs_reference=False,
    reward_scale=None,
)
def sft_mean(logps: PairLogps) -> "Tensor":
    """-log π(y_w)/n_w of each pair (B,): every chosen completion counts the same, however long it is.

    The NLL of Pang et al., who divide each completion by its own length; `sft` is TRL's. Meant as a term of a
    weighted sum: dpo + α·sft_mean is RPO.
    """
    return -token_means(logps)[0]
