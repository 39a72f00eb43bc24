"""Noise schedules, what a denoiser predicts, and its error as a log-prob.

A denoising error takes the place of a log-prob: with h = -½·κ·(SSE_policy - SSE_reference), each objective of
the registry has its image form, and `dpo` is Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908, with
κ = β·T·ω). SSE is the squared error of the noise, summed over the elements of an image, so that κ holds
for each resolution; the 5000 of the paper's code is on means and is 0.305 on the sums of 4 × 64 × 64 latents.

Shapes: B images of any number of dimensions, t (B,) steps or noise levels.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
"""What the network predicts: the noise, v = √ᾱ·ε - √(1-ᾱ)·x, the image, or the flow ε - x."""


@dataclass(frozen=True)
class Noise:
    """The shares of image and noise at each step, with what the network predicts.

    x_t = signal_t · x + noise_t · ε.
    """

    signal_T: Tensor
    noise_T: Tensor
    prediction: Prediction

    @classmethod
    def from_alphas(cls, alphas_cumprod_T: Tensor, prediction: Prediction) -> "Noise":
        """A variance-preserving schedule, from ᾱ of each step."""
        alphas_T = alphas_cumprod_T.double()
        return cls(alphas_T.sqrt(), (1 - alphas_T).sqrt(), prediction)

    @classmethod
    def flow(cls, steps: int) -> "Noise":
        """Rectified flow at `steps` equal noise levels σ = 1/steps … 1."""
        sigma_T = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        return cls(1 - sigma_T, sigma_T, "flow")

    @property
    def steps(self) -> int:
        """Number of noise levels."""
        return len(self.signal_T)

    def noised(self, images_B: Tensor, noise_B: Tensor, t_B: Tensor) -> Tensor:
        """x_t."""
        signal_B, level_B = (_beside(images_B, table_T[t_B]) for table_T in (self.signal_T, self.noise_T))
        return signal_B * images_B + level_B * noise_B

    def target(self, images_B: Tensor, noise_B: Tensor, t_B: Tensor) -> Tensor:
        """What the network should predict."""
        if self.prediction == "epsilon":
            return noise_B
        if self.prediction == "sample":
            return images_B
        if self.prediction == "flow":
            return noise_B - images_B
        signal_B, level_B = (_beside(images_B, table_T[t_B]) for table_T in (self.signal_T, self.noise_T))
        return signal_B * noise_B - level_B * images_B

    def weight(self, t_B: Tensor) -> Tensor:
        """(B,) what a squared error of the prediction is multiplied with to be one of the noise.

        With Δ the error of the same network: ‖Δε‖² = ᾱ‖Δv‖² = ᾱ/(1-ᾱ)·‖Δx‖² where the variance is preserved,
        and (1-σ)²‖Δv‖² for a flow. Without it, another prediction would change β with t.
        """
        signal_B, level_B = self.signal_T[t_B], self.noise_T[t_B]
        if self.prediction == "epsilon":
            return torch.ones_like(signal_B)
        if self.prediction == "sample":
            return (signal_B / level_B) ** 2
        return signal_B**2

    def squared_errors(self, predicted_B: Tensor, target_B: Tensor, t_B: Tensor) -> Tensor:
        """(B,) squared error of the noise, summed over each image in fp32."""
        squares_B = (predicted_B.float() - target_B.float()).square().flatten(1).sum(-1)
        return squares_B * self.weight(t_B).to(squares_B)


def posterior_weights(alphas_cumprod_T: Tensor) -> Tensor:
    """(T,) w_t of KL(q(x_{t-1}|x_t,x_0) ‖ p(x_{t-1}|x_t)) = w_t·‖ε - ε_θ‖², with the posterior's variance.

    w_t = ½·(SNR_{t-1} - SNR_t)·(1-ᾱ_t)/ᾱ_t; Ho et al. 2020 (arXiv 2006.11239), equation 12, and Kingma et al.
    2021 (arXiv 2107.00630). The first is 0: there the decoder's own likelihood would stand.
    """
    alphas_T = alphas_cumprod_T.double()
    snr_T = alphas_T / (1 - alphas_T)
    fall_T = torch.cat([torch.zeros_like(snr_T[:1]), snr_T[:-1] - snr_T[1:]])
    return 0.5 * fall_T / snr_T


def _beside(images_B: Tensor, values_B: Tensor) -> Tensor:
    """The values (B,) with as many dimensions as the images, in their type."""
    return values_B.to(images_B).reshape(-1, *[1] * (images_B.ndim - 1))
