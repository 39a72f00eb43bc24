"""The data stages: load and split the data, validate it at the gate, sample pairs if it has only prompts."""

import datetime
import logging
import shutil
from pathlib import Path
from typing import Literal

import pandas as pd

from dpo_core.data.config import DataConfig
from dpo_core.data.files.read import check_source
from dpo_core.data.load import load
from dpo_core.data.split import by_source, split_table
from dpo_core.data.tokens.config import TokenConfig
from dpo_core.errors import DataError, GateRefused
from dpo_core.estimates import estimate
from dpo_core.jobs.files import PairSamplingJob
from dpo_core.methods.pair_sampling import PairSamplingConfig
from dpo_core.rewards.functions import reward_identity
from dpo_core.system import digest_file
from expectations.config import GateConfig
from expectations.drift import load_baseline
from expectations.job_file import GateJob
from expectations.report import GateReport
from tasks.stages.base import Context, Output, RunningStage, Stage, StageResult, run_stage, stage_task
from tasks.stages.job import common_fields, run_model_job
from tasks.stages.planned_run import PlannedRun
from tasks.store.facts import GateFacts, LoadFacts, SamplingFacts
from tasks.store.manifest import Manifest

log = logging.getLogger("dpo")

LOAD = Stage("load-data", 4, "dataset", LoadFacts)
GATES = {
    kind: Stage(f"validate-{kind}", 2, "dataset", GateFacts, overhead=5.0, job="one rank", subject=kind)
    for kind in ("prompts", "pairs", "unpaired")
}


def kind_of(rows: Manifest) -> Literal["pairs", "unpaired"]:
    """The kind of the training rows, which is also the name of this input of stages."""
    return "unpaired" if rows.stage == GATES["unpaired"].name else "pairs"


def _estimate(run: PlannedRun, label: str) -> estimate.EstimatedWork:
    config = run.recipe.pairs
    return run.sampling_work(None, config.sampling, config.samples_per_prompt)


SAMPLE = Stage("sample-pairs", 3, "dataset", SamplingFacts, _estimate, overhead=4.0, job="shared")


def source_digests(config: DataConfig) -> dict[str, str]:
    """Digests of the local data files, by path, so that an edited file does not match the cache."""
    digests: dict[str, str] = {}
    for path in config.paths:
        try:
            place = Path(path).expanduser()
            files = sorted(_visible(place)) if place.is_dir() else [place]
            digests |= {str(file): digest_file(file) for file in files if file.is_file()}
        except (OSError, RuntimeError) as error:
            check_source(path)  # raises a clearer error for known causes
            raise DataError(f"{path} cannot be read ({error})", "Check its permissions") from error
    return digests


def _visible(folder: Path) -> list[Path]:
    """The files of a folder without hidden ones, which the reader never opens: a clone's .git, caches."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return [f for f in files if not any(part.startswith(".") for part in f.relative_to(folder).parts)]


@stage_task(LOAD.name)
def load_data(context: Context, config: DataConfig) -> StageResult:
    """Read pairs, unpaired rows or prompts into the canonical table, split by prompt."""

    def compute(running: RunningStage) -> Output:
        loaded = load(config)
        frame = split_table(loaded, config)
        for remark in loaded.remarks:
            log.info("%s: %s", running.name, remark)
        running.mlflow.tag("dpo.data_format", f"{loaded.format}: {loaded.recognised_by}")
        out = running.empty_folder("out")
        frame.to_parquet(out / "data.parquet", index=False)
        facts = LoadFacts(
            kind=loaded.kind,
            format=loaded.format,
            recognised_by=loaded.recognised_by,
            read_on=datetime.date.today().isoformat(),
            eval_rows=int((frame["split"] == "eval").sum()),
            remarks=list(loaded.remarks),
            sources=by_source(frame),
            **loaded.notes,
        )
        return Output(out, rows=len(frame), facts=facts)

    key_settings = {"data": config.model_dump(mode="json"), "files": source_digests(config)}
    return run_stage(
        context, LOAD, {}, key_settings, compute, planned_facts=lambda: LoadFacts(kind=load(config).kind)
    )


@stage_task("validate", "validate-{subject}")
def validate(
    context: Context,
    subject: str,
    data: Manifest,
    model: Manifest,
    gate: GateConfig,
    tokens: TokenConfig,
) -> StageResult:
    """Check prompts, pairs or unpaired rows with Great Expectations; write the rows that pass and a report.

    Raises:
        GateRefused: a critical rule failed. Nothing is stored, so no later stage can run.
    """
    baseline = load_baseline(gate.baseline) if gate.baseline else None

    def compute(running: RunningStage) -> Output:
        out = running.empty_folder("out")
        # Outside the store: the pages contain times and random names, so that the same data would get another
        # digest in every run.
        docs = context.workspace / "data_docs" / f"{subject}-{running.scratch.name}"
        shutil.rmtree(docs, ignore_errors=True)
        job = GateJob(
            **common_fields(running),
            subject=subject,
            rows=str(data.path / "data.parquet"),
            model=str(model.path),
            config=gate,
            baseline=baseline,
            tokens=tokens,
            docs=str(docs),
            out=str(out / "data.parquet"),
        )
        result = run_model_job(running, job, total=data.rows or 1, unit="rows")
        report = GateReport.model_validate(result.pop("report"))
        index = Path(report.docs_index).relative_to(context.workspace)
        facts = report.model_copy(update={"docs_index": str(index)})
        (out / "gate.json").write_text(facts.model_dump_json(indent=1))
        running.mlflow.artifact(out / "gate.json")
        running.mlflow.artifact(Path(report.docs_index).parent, "data_docs")
        report.raise_if_refused()
        rows, sides = result.pop("rows"), result.pop("sides")
        _require_sides(sides, report.dropped, sampled=data.stage == SAMPLE.name)
        failed = [f.rule for f in report.findings if not f.passed]
        gate_facts = GateFacts(dropped=report.dropped, warnings=failed, **result)
        metrics = {f"gate/{f.rule}": float(f.rate) for f in report.findings if not f.skipped}
        metrics |= {"data/rows": float(rows), "data/dropped": float(report.dropped)}
        return Output(out, rows=rows, facts=gate_facts, metrics=metrics)

    key_settings = {
        "subject": subject,
        # The baseline by its content, not by its path.
        "gate": gate.model_dump(mode="json", exclude={"baseline"}),
        "baseline": baseline,
        "tokens": tokens.model_dump(mode="json"),
    }
    return run_stage(context, GATES[subject], {"data": data, "tokenizer": model}, key_settings, compute)


def _require_sides(sides: dict[str, int], dropped: int, *, sampled: bool) -> None:
    """Refuse an empty side of the split; sampled pairs may lack held-out ones."""
    for side, use in {"train": "training", "eval": "evaluation"}.items():
        if not sides.get(side) and not (sampled and side == "eval"):
            raise GateRefused(
                f"no row is left for {use}: the gate dropped {dropped} rows and kept {sum(sides.values())}, "
                "none of them on that side of the split",
                "Correct the rows that the gate names, add data, or change data.eval_fraction",
            )


@stage_task(SAMPLE.name)
def sample_pairs(
    context: Context,
    prompts: Manifest,
    reference: Manifest,
    config: PairSamplingConfig,
    tokens: TokenConfig,
    reward: str,
    seed: int,
) -> StageResult:
    """Sample completions of all prompts from the reference, and pair them by a known reward."""

    def compute(running: RunningStage) -> Output:
        out = running.empty_folder("out")
        rows = prompts.path / "data.parquet"
        job = PairSamplingJob(
            **common_fields(running),
            prompts=str(rows),
            model=str(reference.path),
            out=str(out / "data.parquet"),
            config=config,
            tokens=tokens,
            reward=reward,
            seed=seed,
        )
        total = len(pd.read_parquet(rows, columns=["split"])) * config.samples_per_prompt
        facts = SamplingFacts(**run_model_job(running, job, total=total, unit="answers"))
        counts = facts.model_dump(include={"samples", "pairs", "ties", "mean_reward"})
        metrics = {f"data/{name}": float(value) for name, value in counts.items()}
        return Output(
            out, rows=facts.pairs, facts=facts, metrics=metrics | {"cost/flops": facts.flops or 0.0}
        )

    key_settings = {
        "pairs": config.model_dump(mode="json"),
        "tokens": tokens.model_dump(mode="json"),
        "reward": reward_identity(reward),
        "seed": seed,
    }
    return run_stage(context, SAMPLE, {"prompts": prompts, "reference": reference}, key_settings, compute)
