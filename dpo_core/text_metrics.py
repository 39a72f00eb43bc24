"""Numbers about the text that a policy writes: diversity, length, distance from the reference.

Shapes: B responses, T response tokens padded on the right.
"""

from collections.abc import Hashable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def distinct_n(responses: Sequence[Sequence[Hashable]], n: int, *, length: int) -> float:
    """Unique n-grams over all n-grams, pooled over the responses (Li et al. 2016); 0.0 if there are none.

    The share falls as text grows, so every response is first cut to its first `length` tokens; compare two
    policies at the same `length` and the same number of responses. N-grams do not span responses.

    Args:
        responses: the tokens (ids or words) of each response.

    Raises:
        ValueError: n or length is below 1.
    """
    if n < 1 or length < 1:
        raise ValueError(f"n={n} and length={length} must be at least 1")
    cut = [tuple(response[:length]) for response in responses]
    grams = [[tokens[i : i + n] for i in range(len(tokens) - n + 1)] for tokens in cut]
    total = sum(map(len, grams))
    return len(set(chain.from_iterable(grams))) / total if total else 0.0


def mean_response_length(responses: Sequence[Sequence[Hashable]]) -> float:
    """Mean number of tokens per response.

    Raises:
        ValueError: there are no responses.
    """
    if not responses:
        raise ValueError("no responses to measure")
    return sum(map(len, responses)) / len(responses)


def kl_estimates(policy_logps_BT: "Tensor", ref_logps_BT: "Tensor", mask_BT: "Tensor") -> dict[str, "Tensor"]:
    """Sequence KL(π‖π_ref) in nats of each response, from its own sampled tokens: `k1` and `k3`, each (B,).

    Both are sums over the real tokens of the per-token estimators of `dpo_core.ppo_math` and unbiased only
    for responses sampled from the policy at temperature 1 without top-k or top-p. k1 is noisier and may be
    negative; k3 is never negative. Detached; summed in float64.
    """
    from dpo_core.ppo_math import KlEstimator, kl_per_token

    policy_BT, ref_BT = policy_logps_BT.detach().double(), ref_logps_BT.detach().double()
    estimators: tuple[KlEstimator, ...] = ("k1", "k3")
    return {name: kl_per_token(policy_BT, ref_BT, mask_BT, name).sum(dim=1) for name in estimators}
