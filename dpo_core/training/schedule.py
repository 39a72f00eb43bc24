"""The learning-rate schedule."""

import numpy as np

from dpo_core.training.config import OptimConfig


class LearningRateSchedule:
    """Learning-rate factor of a step (0-based): linear warm-up, then constant, linear or cosine to zero."""

    def __init__(self, optim: OptimConfig, total_steps: int) -> None:
        self.kind = optim.schedule
        self.total = max(total_steps, 1)
        self.warmup = int(optim.warmup_fraction * total_steps)

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.kind == "constant":
            return 1.0
        progress = min((step - self.warmup) / max(self.total - self.warmup, 1), 1.0)
        return 1.0 - progress if self.kind == "linear" else 0.5 * (1.0 + float(np.cos(np.pi * progress)))
