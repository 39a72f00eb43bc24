"""The plan of a run: which stages would run and why, with their tokens, operations, memory and time.

The store knows what is cached, and each stage estimates its own work. Nothing is started.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from dpo_core.config import Config
from dpo_core.data.answers import measure_answers
from dpo_core.errors import DpoError
from dpo_core.estimates.estimate import EstimatedWork
from dpo_core.scoring.layout import lay_out
from dpo_core.statistics.format import duration
from dpo_core.training.memory import step_memory, training_memory
from tasks.planning.read_planned_run import read_planned_run
from tasks.planning.speed import Speed
from tasks.recipe.policies import PolicyFields
from tasks.recipe.recipe import Recipe
from tasks.reports.run_warnings import answers_cut, too_few_prompts, without_template
from tasks.runs.recipe import changed_since
from tasks.stages.base import StageResult, Why
from tasks.stages.models import IMPORT
from tasks.stages.planned_run import PlannedRun
from tasks.stages.registry import label_of, stage_of


class StagePlan(Config):
    """One stage of a planned run."""

    name: str
    state: Literal["cached", "runs"]
    why: Why | None = None
    """Why it would run: it never ran here; settings or code changed; other data; damaged artifact."""
    tokens: int = 0
    """Tokens through the model; 0 if the stage runs no model."""
    flops: float = 0.0
    """Floating-point operations."""
    seconds: float = 0.0
    """Rough time; 0 if cached."""
    memory_bytes: int | None = None
    """Peak of each training process; None if the stage trains nothing."""
    memory_parts: dict[str, int] = Field(default_factory=dict)
    """The same by part: process, weights, reference, gradients, optimiser, step."""
    trains: bool = False
    """Whether it is a training job."""
    section: str = ""
    """Where the recipe has a training's settings: `sft`, `policies.DPO`."""
    job: Literal["none", "one rank", "shared", "training"] = "none"
    """Where it computes: in the flow's process; in a job of one rank without a GPU; on the ranks of the
    recipe's `inference`; or on those of the training's engine."""
    processes: int | None = 1
    """Ranks on each node; None: as many as the node has GPUs."""
    note: str = ""
    """Assumptions of the estimate."""


class Plan(Config):
    """The plan of a run."""

    recipe: str
    workspace: str
    device: str
    """GPU or CPU that would compute."""
    memory_bytes: int
    """Memory of the device."""
    parameters: int
    """Parameters of the model."""
    layout: str
    """Whether the model can be aligned, and how: packed, padded (why) or refused (why)."""
    speed: str
    """Source of the times."""
    stages: list[StagePlan]
    tokens: int
    flops: float
    seconds: float
    compared_with: str | None = None
    """The newest finished run of the recipe's name, if there is one."""
    changes: list[str] = Field(default_factory=list)
    """The settings that differ from that run's: `seed: 0 -> 1`, `policies.PPO: new`."""
    warnings: list[str] = Field(default_factory=list)


def make_plan(recipe: Recipe, workspace: str, stages: Mapping[str, StageResult]) -> Plan:
    """The plan of a recipe.

    Args:
        stages: results of the stages in a plan, in the order of the run.
    """
    work = read_planned_run(recipe, stages)
    speed = Speed.of(workspace)
    rows = [_stage(name, result, work, speed) for name, result in stages.items()]
    running = [row for row in rows if row.state == "runs"]
    compared_with, changes = changed_since(workspace, recipe) or (None, [])
    return Plan(
        recipe=recipe.name,
        workspace=workspace,
        device=speed.device,
        memory_bytes=speed.memory_bytes,
        parameters=_parameters(work, stages),
        layout=work.layout,
        speed=speed.source,
        stages=rows,
        tokens=sum(row.tokens for row in running),
        flops=sum(row.flops for row in running),
        seconds=sum(row.seconds for row in running),
        compared_with=compared_with,
        changes=changes,
        warnings=[
            *(line for row in running if (line := _too_large(row, work, speed))),
            *_early_warnings(recipe, work),
            *([] if recipe.study else _baselines(running, work)),
        ],
    )


def _parameters(work: PlannedRun, stages: Mapping[str, StageResult]) -> int:
    """Parameters of the model; 0 for a diffusion model that is not imported yet."""
    if work.recipe.diffusion:
        return stages[IMPORT.name].manifest.parameters or 0
    return work.shape.parameters


def _early_warnings(recipe: Recipe, work: PlannedRun) -> list[str]:
    """Warnings about the evaluation that are known before the run."""
    held_out = work.gated[work.gated["split"] == "eval"].drop_duplicates(["prompt", "chat"])
    if recipe.diffusion:
        return [line for line in [too_few_prompts(recipe, len(held_out))] if line]
    warnings = [
        without_template(recipe, work.tokenise.note_on(work.gated["chat"].tolist())),
        too_few_prompts(recipe, len(held_out)),
        "" if recipe.study else answers_cut(recipe, measure_answers(work.gated, work.tokenise)),
    ]
    return [*recipe.unusual_parameters, *(line for line in warnings if line)]


def _baselines(rows: list[StagePlan], work: PlannedRun) -> list[str]:
    """Warnings about policies that only serve for comparison and take a third of the time or more."""
    total = sum(row.seconds for row in rows)
    needed = _needed(work.recipe.policies, work.recipe.candidate_name)
    lines = []
    for row in rows:
        node = work.nodes.get(label_of(row.name))
        if not row.trains or node is None or node.policy in needed or row.seconds < total / 3:
            continue
        lines.append(
            f"policy {node.policy} alone takes ~{duration(row.seconds)} of ~{duration(total)}, and is there "
            f"to compare with: without it, set policies.{node.policy}=null"
        )
    return lines


def _needed(policies: Mapping[str, PolicyFields], name: str) -> set[str]:
    """The names of a policy and of all policies that it starts from or uses as reference."""
    own = [model for model in policies[name].models if model in policies]
    return {name}.union(*(_needed(policies, model) for model in own))


def _stage(name: str, result: StageResult, run: PlannedRun, speed: Speed) -> StagePlan:
    stage = stage_of(name)
    trains = stage.settings is not None
    job = "training" if trains else stage.job
    if result.cached:
        return StagePlan(name=name, state="cached", trains=trains, job=job)
    work = stage.estimate(run, label_of(name)) if stage.estimate else EstimatedWork()
    parts = _memory(work, run, speed)
    processes = work.engine.processes if work.engine else work.processes
    if processes is None:
        processes = run.recipe.inference.processes if stage.job == "shared" else 1
    return StagePlan(
        name=name,
        state="runs",
        why=result.why,
        trains=trains,
        section=stage.settings(run, label_of(name))[0] if stage.settings else "",
        job=job,
        tokens=round(work.tokens),
        flops=work.flops,
        seconds=speed.seconds(name, work.flops, work.precision, processes or 1),
        memory_bytes=sum(parts.values()) or None,
        memory_parts=parts,
        processes=processes,
        note=work.note,
    )


def _memory(work: EstimatedWork, run: PlannedRun, speed: Speed) -> dict[str, int]:
    if work.engine is None or work.fullest is None:
        return {}
    step = step_memory(run.config, lay_out(work.fullest), work.engine, on_gpu=speed.on_gpu)
    peak = training_memory(
        step,
        work.engine,
        micro_batches=work.micro_batches,
        references=work.references,
        on_gpu=speed.on_gpu,
    )
    return dict(vars(peak))


def _too_large(row: StagePlan, work: PlannedRun, speed: Speed) -> str:
    """A warning with remedies if a stage needs more memory than the device has; else empty."""
    # CPU ranks share the machine's memory; every GPU rank has its own.
    needed = (row.memory_bytes or 0) * (1 if speed.on_gpu else row.processes or 1)
    if needed <= speed.memory_bytes:
        return ""
    settings = stage_of(row.name).settings
    assert settings is not None  # only trainings have a memory estimate
    section, config = settings(work, label_of(row.name))
    remedies = []
    if row.memory_parts["step"] > row.memory_bytes / 3:  # type: ignore[operator]
        packed = getattr(config, "pack_tokens", None) is not None
        remedies.append(f"lower {section}.{'pack_tokens' if packed else 'micro_batch_size'}")
        if _allowed(config, {"gradient_checkpointing": True}):
            remedies.append(f"set {section}.engine.gradient_checkpointing=true")
    if speed.on_gpu:
        stages = [n for n in range(config.engine.zero_stage + 1, 4) if _allowed(config, {"zero_stage": n})]
        higher = f" and {section}.engine.zero_stage (to {stages[-1]} at most)" if stages else ""
        remedies.append(f"raise {section}.engine.processes{higher}")
    elif (row.processes or 1) > 1:
        remedies.append(f"lower {section}.engine.processes")
    gib = 2**30
    return (
        f"{row.name} needs {needed / gib:.1f} GiB and this machine has {speed.memory_bytes / gib:.1f} GiB: "
        + (", or ".join(remedies) or "use a smaller model")
    )


def _allowed(config: Any, engine: dict[str, Any]) -> bool:
    """True if these engine settings are valid for the stage and would change it."""
    fields = config.model_dump(mode="json")
    if fields["engine"].items() >= engine.items():
        return False
    try:
        type(config).model_validate(fields | {"engine": fields["engine"] | engine})
    except (ValidationError, DpoError):
        return False
    return True
