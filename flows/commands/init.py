"""The body of `dpo init`: measures a data set and writes a recipe with settings that fit it."""

import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import typer

from dpo_core.data.answers import measure_answers
from dpo_core.data.config import DataConfig
from dpo_core.data.load import load
from dpo_core.data.split import split_by_prompt
from dpo_core.data.tokens.config import TokenConfig
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.errors import RecipeError
from dpo_core.evaluation.config import PromotionConfig
from dpo_core.models.config import ModelConfig
from flows.commands.validate import tokenise_of
from tasks.recipe.read import load_recipe

_MOST_HELD_OUT = 30
"""Percent; more would leave too few rows to train on."""
_MOST_TOKENS = 248
"""New tokens that leave room for prompts within the default `tokens.max_length`."""
_TRIAL = (
    "--set name={name}-trial --set data.limit=40 --set 'sft={{enabled: false}}'",
    "--set reward.source={reward} --set evaluate.prompts=8 --set evaluate.samples_per_prompt=1",
)
"""Overrides that make a first run short."""


def write_recipe(data: str, model: str, reward: str | None, file: Path | None) -> None:
    """Write the recipe, and print it with the commands that come next.

    Args:
        reward: as `reward.source` in a recipe; None: a reward model is trained on the answers.
        file: the recipe; None: named after the data, in the current folder.

    Raises:
        DataError: the data cannot be read.
        ModelError: the tokenizer cannot be used.
        RecipeError: the file exists or cannot be written, or data without pairs have no reward.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(data).name.partition(".")[0]).strip("-._")[:60] or "own"
    file = file or Path(f"{name}.yaml")
    if file.exists():
        raise RecipeError(f"{file} exists", "Name another file with --file, or remove it")
    loaded = load(DataConfig(path=_whole(data)))
    if loaded.kind != "pairs" and reward is None:
        raise RecipeError(
            f"{data} has no pairs, from which a reward model could be trained to measure by",
            "Name a known reward with --reward, such as my_reward.py:score",
        )
    tokenise = tokenise_of(ModelConfig(name=_whole(model)), TokenConfig())
    script, colon, function = (reward or "").partition(":")
    lines = [
        f"# {loaded.format}, {len(loaded.frame):,} rows. Every setting: dpo config show {file}",
        f"name: {json.dumps(name)}  # of the runs, and of the registered model dpo-{name}",
        f"model: {{name: {json.dumps(_whole(model))}}}",
        "data:",
        f"  path: {json.dumps(_whole(data))}",
        _held_out(loaded.frame),
        *_template(loaded.frame, tokenise),
        *([f"reward: {{source: {json.dumps(_whole(script) + colon + function)}}}"] if reward else []),
        *(
            ["sft: {enabled: false}  # there are no answers to learn from"]
            if loaded.kind == "prompts"
            else []
        ),
        "policies:",
        "  KTO: {method: kto}" if loaded.kind == "unpaired" else "  DPO: {method: dpo}",
        *_lengths(loaded.frame, tokenise),
        "# A first run in minutes, on few rows and without a reward model; its model is not worth keeping:",
        f"#   dpo run {shlex.quote(str(file))} {_TRIAL[0].format(name=name)} \\",
        f"#     {_TRIAL[1].format(reward=reward or 'sentiment')}",
    ]
    text = "\n".join(lines) + "\n"
    try:
        with file.open("x", encoding="utf-8") as handle:
            handle.write(text)
    except OSError as error:
        raise RecipeError(f"{file} cannot be written ({error.strerror})", "Name another --file") from error
    load_recipe(str(file))
    typer.echo(text)
    typer.echo(
        f"wrote {file}; next: dpo validate {shlex.quote(data)} --recipe {shlex.quote(str(file))} --show 1"
    )


def _whole(path: str) -> str:
    """The whole path of an existing file or folder: a deployment starts its runs in another folder. Other
    names are unchanged."""
    local = Path(path).expanduser()
    return str(local.absolute()) if path and local.exists() else path


def _held_out(frame: pd.DataFrame) -> str:
    """The share of prompts that promotion needs, and some more, because the gate may drop rows."""
    needed = PromotionConfig().min_prompts
    prompts = len(frame[frame["fault"] == ""].drop_duplicates(["prompt", "chat"]))
    for percent in range(10, _MOST_HELD_OUT + 1):
        split = split_by_prompt(frame, percent / 100, 0)
        held_out = len(split[split["split"] == "eval"].drop_duplicates(["prompt", "chat"]))
        if held_out >= 1.1 * needed:
            break
    why = f"{held_out:,} of {prompts:,} prompts are held out; promotion compares at least {needed}"
    if held_out < needed:
        why += ", so this run can only show how things work: add data"
    return f"  eval_fraction: {percent / 100}  # {why}"


def _template(frame: pd.DataFrame, tokenise: Tokenise) -> list[str]:
    """Questions that are plain texts are asked by the model's chat template; without it, question and answer
    would be one text."""
    if not tokenise.note_on(frame["chat"].tolist()):
        return []
    return [
        "tokens:",
        "  template: chat  # each prompt is a user turn; plain: a text that the model continues",
    ]


def _lengths(frame: pd.DataFrame, tokenise: Tokenise) -> list[str]:
    """Room for a quarter more tokens than most answers of the data have."""
    answers = measure_answers(frame[frame["fault"] == ""], tokenise)
    if answers is None:
        sampled = "sampling: {max_new_tokens: 64}"
        return [f"pairs: {{{sampled}}}  # the longest answers that you expect", f"evaluate: {{{sampled}}}"]
    longest = float(np.quantile(answers.tokens, 0.95))
    tokens = min(8 * math.ceil(1.25 * longest / 8), _MOST_TOKENS)
    why = f"95 % of the data's answers have at most {longest:.0f}"
    return ["evaluate:", f"  sampling: {{max_new_tokens: {tokens}}}  # {why}"]
