"""Calculates the traffic and memory of training on many GPUs: the tables of flows/docs/scaling.md.

Weights, gradients and AdamW's moments are fp32 here (bf16 is autocast), so each is 4 bytes a parameter.
`python -m dpo_core.training.scaling` prints the tables. Volumes: Rajbhandari et al., arXiv 1910.02054, §7.
"""

from typing import Literal

BYTES = 4
Stage = Literal[0, 1, 2, 3]

# Parameters of the two models of the tables.
MODELS = {"7B": 7e9, "70B": 70e9}
NODES = (1, 2, 4, 8, 16, 32, 64)
GPUS = 8
# A 400 Gbit/s card for each GPU, as in an H100 node; inside one node NVLink is about nine times that.
LINK_BYTES_PER_SECOND = 50e9
NVLINK_BYTES_PER_SECOND = 450e9
GPU_BYTES = 80e9


def sent_bytes(parameters: float, ranks: int, stage: Stage, micro_batches: int = 1) -> float:
    """Bytes that one rank sends in an optimiser step, with ring collectives.

    A ring gather or scatter of n bytes sends n·(ranks-1)/ranks, an all-reduce twice that. Stage 0 all-reduces
    gradients once a step; 1 scatters their sums and gathers weights once a step; 2 scatters sums after each
    micro-batch; 3 gathers weights for each forward and each backward pass besides.
    """
    gathers: dict[int, float] = {0: 2, 1: 2, 2: micro_batches + 1, 3: 3 * micro_batches}
    return gathers[stage] * parameters * BYTES * (ranks - 1) / ranks


def state_bytes(parameters: float, ranks: int, stage: Stage) -> float:
    """Bytes of weights, gradients and moments on one rank, without activations."""
    weights, gradients, moments = (parameters * BYTES * n for n in (1, 1, 2))
    if stage >= 1:
        moments /= ranks
    if stage >= 2:
        gradients /= ranks
    if stage >= 3:
        weights /= ranks
    return weights + gradients + moments


def seconds(parameters: float, nodes: int, stage: Stage, micro_batches: int = 1) -> float:
    """Time that a step's traffic takes if none of it overlaps with computation: an upper bound."""
    speed = LINK_BYTES_PER_SECOND if nodes > 1 else NVLINK_BYTES_PER_SECOND
    return sent_bytes(parameters, nodes * GPUS, stage, micro_batches) / speed


def recommendation(parameters: float, nodes: int) -> str:
    """The lowest stage whose state leaves a third of the GPU's memory to activations, as recipe settings."""
    ranks = nodes * GPUS
    stages: tuple[Stage, ...] = (0, 1, 2, 3)
    for stage in stages:
        if state_bytes(parameters, ranks, stage) <= GPU_BYTES * 2 / 3:
            return f"`zero_stage: {stage}`"
    if state_bytes(parameters, ranks, 3) - parameters * BYTES * 2 / ranks <= GPU_BYTES * 2 / 3:
        return "`zero_stage: 3, offload: optimizer`"
    return "`zero_stage: 3, offload: parameters`"


def table(name: str, micro_batches: int = 1) -> str:
    """A Markdown table of the GB that a GPU sends in a step at each stage (and the seconds), and settings."""
    lines = [
        "| nodes | stage 0 | stage 1 | stage 2 | stage 3 | state a GPU at stage 0 / 3 | recipe |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    size = MODELS[name]
    for nodes in NODES:
        ranks = nodes * GPUS
        stages: tuple[Stage, ...] = (0, 1, 2, 3)
        volumes = [sent_bytes(size, ranks, stage, micro_batches) / 1e9 for stage in stages]
        times = [seconds(size, nodes, stage, micro_batches) for stage in stages]
        cells = [f"{gb:.0f} GB ({s:.1f} s)" for gb, s in zip(volumes, times, strict=True)]
        state = f"{state_bytes(size, ranks, 0) / 1e9:.0f} / {state_bytes(size, ranks, 3) / 1e9:.1f} GB"
        lines.append(f"| {nodes} | {' | '.join(cells)} | {state} | {recommendation(size, nodes)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    for model in MODELS:
        print(f"{model}\n\n{table(model)}\n")
