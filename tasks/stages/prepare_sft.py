"""The stage that prepares the reference: supervised fine-tuning on demonstrations."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from dpo_core.data.demo.reviews import review_demonstrations
from dpo_core.data.files.read import check_source, read_rows
from dpo_core.data.tokens.config import TokenConfig
from dpo_core.data.tokens.image_codes import text_of
from dpo_core.errors import DataError, StageFailed
from dpo_core.estimates import estimate
from dpo_core.estimates.by_method import estimate_training
from dpo_core.images.prompts import captioned_scenes
from dpo_core.images.scenes import codes_of
from dpo_core.methods.diffusion_sft import METHOD as DIFFUSION
from dpo_core.methods.sft import METHOD, SftConfig
from dpo_core.scoring.document import Document
from dpo_core.system import digest_file
from tasks.stages.base import Context, Output, RunningStage, Stage, StageResult, run_stage, stage_task
from tasks.stages.data import kind_of
from tasks.stages.planned_run import SAMPLED_ROWS, PlannedRun
from tasks.stages.training_job import TrainingSetup, key_settings_of, train
from tasks.store.facts import TrainingFacts
from tasks.store.manifest import Manifest


def _estimate(run: PlannedRun, label: str) -> estimate.EstimatedWork:
    config, recipe = run.recipe.sft, run.recipe
    if recipe.diffusion_sft is not None:
        return estimate_training(DIFFUSION.name, recipe.diffusion_sft, run.inputs())
    count = config.made_scenes
    if config.reads_answers:
        rows = chosen_answers(run.gated, run.kind)
    elif count is not None:  # more than a plan should make
        rows = scene_demonstrations(min(count, SAMPLED_ROWS), recipe.seed)
    else:
        rows = demonstrations(config, None, recipe.seed)[0]()
    sequences = [run.tokenise.demonstration(row) for row in rows[:SAMPLED_ROWS]]
    documents = [Document.of(s) for s in sequences if not isinstance(s, str)]
    examples = estimate.Examples(documents, count or len(rows))
    inputs = replace(run.inputs(), examples=lambda data, limit=None: examples)
    return estimate_training(METHOD.name, config, inputs)


SFT = Stage(
    "prepare-sft",
    METHOD.version,
    METHOD.artifact,
    TrainingFacts,
    _estimate,
    overhead=20.0,
    settings=lambda run, label: (
        ("diffusion_sft", run.recipe.diffusion_sft) if run.recipe.diffusion else ("sft", run.recipe.sft)
    ),
)


@stage_task(SFT.name)
def prepare_sft(
    context: Context,
    base: Manifest,
    data: Manifest | None,
    config: SftConfig,
    tokens: TokenConfig,
    seed: int,
) -> StageResult:
    """Make the reference: fine-tune the base model on demonstrations, or on chosen or desirable answers."""
    rows, source = demonstrations(config, data, seed)
    inputs = {"base": base}
    if source == "chosen" and data is not None:
        inputs[kind_of(data)] = data

    def compute(running: RunningStage) -> Output:
        examples = running.scratch / "demonstrations.parquet"
        pd.DataFrame(rows()).to_parquet(examples, index=False)
        count = len(pd.read_parquet(examples, columns=["id"]))
        return train(running, setup, {"model": str(base.path), "data": str(examples)}, count)

    setup = TrainingSetup(METHOD, config, tokens, seed)
    return run_stage(context, SFT, inputs, key_settings_of(setup) | {"source": source}, compute)


def demonstrations(config: SftConfig, data: Manifest | None, seed: int) -> tuple[Any, str]:
    """A function that returns the demonstrations, and their identity in the stage's key."""
    if config.made_demonstrations is not None:
        count = config.made_demonstrations
        reviews = review_demonstrations(count, seed)
        return lambda: [_demonstration(i, p, c) for i, (p, c) in enumerate(reviews)], f"made:{count}"
    if config.made_scenes is not None:
        scenes = config.made_scenes
        return lambda: scene_demonstrations(scenes, seed), f"scenes:{scenes}"
    if config.demonstrations is not None:
        path = config.demonstrations
        place = check_demonstrations(path)
        return lambda: _read_demonstrations(path), f"file:{digest_file(place)}"
    if data is None:
        raise StageFailed("SFT has neither demonstrations nor pairs", "Set sft.demonstrations")

    return lambda: chosen_answers(pd.read_parquet(data.path / "data.parquet"), kind_of(data)), "chosen"


def chosen_answers(rows: pd.DataFrame, kind: str = "pairs") -> list[dict[str, Any]]:
    """The chosen or desirable answers of the training rows as demonstrations, without duplicates."""
    frame = rows[rows["split"] == "train"]
    if kind == "unpaired":
        frame = frame[frame["label"]]
    frame = frame.rename(columns={"chosen": "completion", "chosen_ended": "ended"})
    frame = frame.drop_duplicates(["prompt", "completion"])
    columns = ["id", "prompt", "chat", "completion", "ended", "tools", "answer_chat"]
    return frame[[name for name in columns if name in frame]].to_dict("records")


def scene_demonstrations(count: int, seed: int) -> list[dict[str, Any]]:
    """Captioned scenes; a tenth have no caption, so that the model also knows images without a prompt."""
    return [
        _demonstration(i, "" if i % 10 == 9 else record.prompt, text_of(codes_of(things).tolist()))
        for i, (record, things) in enumerate(captioned_scenes(count, seed, wrong=0.35))
    ]


def check_demonstrations(path: str) -> Path:
    """Return the path of the file of demonstrations.

    Raises:
        DataError: the file does not exist, cannot be read, or is a folder.
    """
    check_source(path)
    place = Path(path).expanduser()
    if not place.is_file():
        raise DataError(f"there is no file of demonstrations {path}", "Name one file in sft.demonstrations")
    return place


def _demonstration(index: int, prompt: str, completion: str) -> dict[str, Any]:
    return {"id": f"made-{index}", "prompt": prompt, "chat": False, "completion": completion, "ended": True}


def _read_demonstrations(path: str) -> list[dict[str, Any]]:
    entries = []
    for first, rows in read_rows(path):
        for number, row in enumerate(rows, first):
            prompt, completion = row.get("prompt"), row.get("completion")
            if not (isinstance(prompt, str) and isinstance(completion, str) and completion.strip()):
                raise DataError(
                    f"{path}, row {number}: a demonstration needs a prompt and a completion, both text",
                    "Correct or remove the row",
                )
            entry = _demonstration(number, prompt, completion)
            entries.append(entry | {"id": f"row-{number}"})
    return entries
