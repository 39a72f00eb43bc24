"""Closed forms of the denoising errors, and the registry's objectives on them."""

import math

import pytest
import torch

from dpo_core.images.noise import Noise, posterior_weights
from dpo_core.objectives import PairLogps, Term, combine, get


def _stable_diffusion() -> torch.Tensor:
    """ᾱ of Stable Diffusion's schedule: β from .00085 to .012, linear in its root."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def _loss(name: str, sums: dict[str, list[float]], kappa: float) -> torch.Tensor:
    """The objective with β = 1 on h = -½κ(policy - reference)."""
    fields = {
        side: torch.tensor(values, dtype=torch.float64, requires_grad=True) for side, values in sums.items()
    }
    scaled = {side: -0.5 * kappa * values for side, values in fields.items()}
    ones = torch.ones(len(fields["chosen_B"]), dtype=torch.float64)
    logps = PairLogps(**scaled, chosen_tokens_B=ones, rejected_tokens_B=ones)
    parameters = get(name).resolve({get(name).reward_scale: 1.0} if get(name).reward_scale else {})
    loss = combine([Term(name, 1.0, parameters)], logps)
    loss.sum().backward()
    return torch.stack([loss.detach(), fields["chosen_B"].grad])


def test_dpo_on_errors_is_diffusion_dpo():
    sums = {
        "chosen_B": [0.0100],
        "ref_chosen_B": [0.0102],
        "rejected_B": [0.0203],
        "ref_rejected_B": [0.0201],
    }
    loss, gradient = _loss("dpo", sums, 5000.0)
    assert loss.item() == pytest.approx(0.313262, abs=1e-6)
    assert gradient.item() == pytest.approx(672.35, abs=5e-3)
    at_reference = {side: [0.5] for side in sums}
    assert _loss("dpo", at_reference, 5000.0)[0].item() == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize("name", ["ipo_sum", "cdpo", "robust", "chi_po"])
def test_other_objectives_need_no_line_of_their_own(name):
    better = {"chosen_B": [0.9], "ref_chosen_B": [1.0], "rejected_B": [1.1], "ref_rejected_B": [1.0]}
    assert _loss(name, better, 2.0)[0] < _loss(name, {side: [1.0] for side in better}, 2.0)[0]


def test_posterior_weights_have_their_known_values():
    alphas = _stable_diffusion()
    weights = posterior_weights(alphas)
    assert weights[[50, 500, 950]].tolist() == pytest.approx([0.011631, 0.003349, 0.005686], abs=1e-6)
    betas = 1 - alphas[1:] / alphas[:-1]
    variance = betas * (1 - alphas[:-1]) / (1 - alphas[1:])
    direct = betas**2 / (2 * variance * (1 - betas) * (1 - alphas[1:]))
    assert torch.allclose(weights[1:], direct, rtol=1e-9)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_of_one_network_has_the_error_of_its_noise(prediction):
    """A network that knows x_t: its noise, its v and its image are one another's functions."""
    generator = torch.Generator().manual_seed(0)
    image, noise, guess = torch.randn(3, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([3, 200, 500, 700, 990])
    schedule = Noise.from_alphas(_stable_diffusion(), prediction)
    signal, level = (table[t].reshape(-1, 1, 1, 1) for table in (schedule.signal_T, schedule.noise_T))
    noised = schedule.noised(image, noise, t)
    guessed_image = (noised - level * guess) / signal
    predicted = schedule.target(guessed_image, guess, t)
    errors = schedule.squared_errors(predicted, schedule.target(image, noise, t), t)
    expected = (guess - noise).square().flatten(1).sum(-1).float()
    assert torch.allclose(errors, expected, rtol=1e-4)


def test_a_flow_has_the_error_of_its_noise():
    generator = torch.Generator().manual_seed(0)
    image, noise, guess = torch.randn(3, 4, 3, 4, 4, generator=generator, dtype=torch.float64)
    schedule = Noise.flow(100)
    t = torch.tensor([0, 30, 60, 98])
    sigma = schedule.noise_T[t].reshape(-1, 1, 1, 1)
    noised = schedule.noised(image, noise, t)
    flow = guess - (noised - sigma * guess) / (1 - sigma)
    errors = schedule.squared_errors(flow, schedule.target(image, noise, t), t)
    assert torch.allclose(errors, (guess - noise).square().flatten(1).sum(-1).float(), rtol=1e-4)
