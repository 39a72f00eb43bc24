"""`PlannedDenoiserRun`: the work of a run of a diffusion model, from its numbers of images."""

from dataclasses import dataclass

from dpo_core.estimates.estimate import EstimatedWork, Examples, Inputs
from dpo_core.generation.config import SamplingConfig
from tasks.recipe.policies import PolicyFields
from tasks.stages.planned_run import PlannedRun

_MEMORY = "the memory of diffusion models is not estimated"


@dataclass(frozen=True)
class PlannedDenoiserRun(PlannedRun):
    """Images through a network in place of tokens."""

    image_flops: float = 0.0
    """Operations of a forward pass on one image."""
    captioned: int = 0
    """Captioned images to train on."""

    def inputs(self, policy: PolicyFields | None = None) -> Inputs:
        """The inputs of a training's estimate, which read numbers of examples alone."""
        return Inputs(
            shape=None,  # type: ignore[arg-type]
            examples=self.examples,
            packed=False,
            seed=self.recipe.seed,
            new_tokens=0,
            learned_reward=False,
            image_flops=self.image_flops,
        )

    def examples(self, data: str, limit: int | None = None) -> Examples:
        """The number of captioned images (`demonstrations`) or of pairs."""
        if data == "demonstrations":
            return Examples([], self.captioned, _MEMORY)
        frame = self.gated if self.kind == "pairs" else self.sampled
        if frame is not None:
            return Examples([], int((frame["split"] == "train").sum()), _MEMORY).limited(limit)
        each = self.recipe.pairs.most_pairs
        note = f"pairs are not sampled yet: at most {each} per prompt; {_MEMORY}"
        return Examples([], each * self._prompts("train", None), note).limited(limit)

    def sampling_work(
        self, side: str | None, sampling: SamplingConfig, each: int, most: int | None = None
    ) -> EstimatedWork:
        """The work of drawing `each` images for all prompts of a side, or `most`."""
        passes = sampling.denoising_steps * (1 if sampling.guidance == 1 else 2)
        return EstimatedWork(flops=self._prompts(side, most) * each * passes * self.image_flops)

    def evaluation_work(self, policies: int) -> EstimatedWork:
        """The work of an evaluation of `policies` models, the reference among them: each draws its images."""
        config = self.recipe.evaluate
        work = self.sampling_work("eval", config.sampling, config.samples_per_prompt, config.prompts)
        return EstimatedWork(flops=policies * work.flops)

    def _prompts(self, side: str | None, most: int | None) -> int:
        rows = self.gated if side is None else self.gated[self.gated["split"] == side]
        if most is None:
            return len(rows)
        return min(len(rows.drop_duplicates(["prompt", "chat"])), most)
