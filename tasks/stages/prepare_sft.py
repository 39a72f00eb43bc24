"""The stage that prepares the reference: supervised fine-tuning on demonstrations."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from dpo_core.data.demo.demonstrations import review_demonstrations
from dpo_core.data.files.read import check_source, read_rows
from dpo_core.data.tokens.tokenise import TokenConfig
from dpo_core.errors import DataError, StageFailed
from dpo_core.estimates import estimate
from dpo_core.estimates.by_method import estimate_training
from dpo_core.methods.sft import METHOD, SftConfig
from dpo_core.scoring.document import Document
from dpo_core.system import digest_file
from tasks.stages.base import Context, Output, Stage, StageResult, Work, run_stage, stage_task
from tasks.stages.data import kind_of
from tasks.stages.training_job import Run, settings_of, train
from tasks.stages.workload import SAMPLED_ROWS, Workload
from tasks.store.facts import TrainingFacts
from tasks.store.manifest import Manifest


def _estimate(workload: Workload, label: str) -> estimate.Work:
    config, recipe = workload.recipe.sft, workload.recipe
    if config.made_demonstrations is None and config.demonstrations is None:
        rows = chosen_side(workload.judged, workload.kind)
    else:
        rows = demonstrations(config, None, recipe.seed)[0]()
    sequences = [workload.tokenise.demonstration(row) for row in rows[:SAMPLED_ROWS]]
    documents = [Document.of(s) for s in sequences if not isinstance(s, str)]
    examples = estimate.Examples(documents, len(rows))
    inputs = replace(workload.inputs(), examples=lambda data, limit=None: examples)
    return estimate_training(METHOD.name, config, inputs)


SFT = Stage(
    "prepare-sft",
    METHOD.version,
    METHOD.artifact,
    TrainingFacts,
    _estimate,
    overhead=20.0,
    settings=lambda workload, label: ("sft", workload.recipe.sft),
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
    """Fine-tune on demonstrations, or on the chosen or desirable answers; the result is the reference of
    everything after."""
    rows, source = demonstrations(config, data, seed)
    inputs = {"base": base}
    if source == "chosen" and data is not None:
        inputs[kind_of(data)] = data

    def work(given: Work) -> Output:
        examples = given.scratch / "demonstrations.parquet"
        pd.DataFrame(rows()).to_parquet(examples, index=False)
        count = len(pd.read_parquet(examples, columns=["id"]))
        return train(given, run, {"model": str(base.path), "data": str(examples)}, count)

    run = Run(METHOD, config, tokens, seed)
    return run_stage(context, SFT, inputs, settings_of(run) | {"source": source}, work)


def demonstrations(config: SftConfig, data: Manifest | None, seed: int) -> tuple[Any, str]:
    """A function that gives the demonstrations, and what names them in the stage's key."""
    if config.made_demonstrations is not None:
        count = config.made_demonstrations
        made = review_demonstrations(count, seed)
        return lambda: [_demonstration(i, p, c) for i, (p, c) in enumerate(made)], f"made:{count}"
    if config.demonstrations is not None:
        path = config.demonstrations
        place = check_demonstrations(path)
        return lambda: _read_demonstrations(path), f"file:{digest_file(place)}"
    if data is None:
        raise StageFailed("SFT has neither demonstrations nor pairs", "Set sft.demonstrations")

    return lambda: chosen_side(pd.read_parquet(data.path / "data.parquet"), kind_of(data)), "chosen"


def chosen_side(rows: pd.DataFrame, kind: str = "pairs") -> list[dict[str, Any]]:
    """The chosen or desirable answers of the training rows as demonstrations, each once."""
    frame = rows[rows["split"] == "train"]
    if kind == "unpaired":
        frame = frame[frame["label"]]
    frame = frame.rename(columns={"chosen": "completion", "chosen_ended": "ended"})
    frame = frame.drop_duplicates(["prompt", "completion"])
    columns = ["id", "prompt", "chat", "completion", "ended", "tools", "answer_chat"]
    return frame[[name for name in columns if name in frame]].to_dict("records")


def check_demonstrations(path: str) -> Path:
    """The file of demonstrations, which is there and can be read.

    Raises:
        DataError: it is not, or it is not one file.
    """
    check_source(path)
    place = Path(path).expanduser()
    if not place.is_file():
        raise DataError(f"there is no file of demonstrations {path}", "Name one file in sft.demonstrations")
    return place


def _demonstration(index: int, prompt: str, completion: str) -> dict[str, Any]:
    return {"id": f"made-{index}", "prompt": prompt, "chat": False, "completion": completion, "ended": True}


def _read_demonstrations(path: str) -> list[dict[str, Any]]:
    found = []
    for first, rows in read_rows(path):
        for number, row in enumerate(rows, first):
            prompt, completion = row.get("prompt"), row.get("completion")
            if not (isinstance(prompt, str) and isinstance(completion, str) and completion.strip()):
                raise DataError(
                    f"{path}, row {number}: a demonstration needs a prompt and a completion, both text",
                    "Mend or remove the row",
                )
            entry = _demonstration(number, prompt, completion)
            found.append(entry | {"id": f"row-{number}"})
    return found
