"""The table of bad inputs: what is given, the exit code, and the words that the one line of error must hold.

A case is a function that makes the bad input and returns the command line; its name is the test's id.
"""

import contextlib
import copy
import io
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

ENGINE = {"precision": "fp32", "threads": 1, "save_every": 1}
SIZES = {"max_steps": 1, "batch_size": 4, "micro_batch_size": 4, "engine": ENGINE}
SAMPLING = {"max_new_tokens": 4, "batch_size": 8, "precision": "fp32"}
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    make: Callable[["World"], list[str]]
    code: int
    words: tuple[str, ...]
    adds: frozenset[str]
    """Stages before the failing one whose (whole) artifacts the run may leave."""
    usage: bool
    """Refused by the option parser, which prints its own box."""


CASES: dict[str, Case] = {}


def bad(
    code: int, *words: str, adds: str = "", usage: bool = False
) -> Callable[[Callable[["World"], list[str]]], Callable[["World"], list[str]]]:
    """Enter the decorated function in the table."""

    def enter(make: Callable[["World"], list[str]]) -> Callable[["World"], list[str]]:
        name = make.__name__
        assert name not in CASES, name
        CASES[name] = Case(make, code, words, frozenset(adds.split()), usage)
        return make

    return enter


@dataclass
class Result:
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@contextlib.contextmanager
def _loggers_as_before() -> Iterator[None]:
    """What the command line sets for its terminal must not silence the logs that later tests read."""
    loggers = [logging.getLogger(name) for name in ("dpo", "tasks", "dpo_core")]
    before = [(logger, logger.level, logger.handlers, logger.propagate) for logger in loggers]
    try:
        yield
    finally:
        for logger, level, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


def dpo(*arguments: str) -> Result:
    """The real command line in this process: `main()` with its exit code and streams."""
    from flows.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    code = 0
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with _loggers_as_before(), streams[0], streams[1], patch.object(sys, "argv", ["dpo", *arguments]):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def good_rows(count: int = 24) -> Rows:
    """Pairs without a fault; which side is longer alternates."""
    answers = (" It was good and warm, number {}.", " It was cold, so we left it on table {}.")
    return [
        {
            "prompt": f"How was the soup on day {i}?",
            "chosen": answers[i % 2].format(i),
            "rejected": answers[1 - i % 2].format(i),
        }
        for i in range(count)
    ]


def lines(rows: Rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@dataclass
class World:
    """One workspace with a good run, and the means to make bad inputs beside it."""

    folder: Path
    model: Path
    _count: int = field(default=0)

    @property
    def workspace(self) -> Path:
        return self.folder / "runs"

    def recipe_of(self, **changes: Any) -> dict[str, Any]:
        """The good recipe with changes laid over it; None takes a field away."""
        good: dict[str, Any] = {
            "name": "tiny",
            "workspace": str(self.workspace),
            "model": {"name": str(self.model)},
            "data": {"path": str(self.folder / "good.jsonl"), "eval_fraction": 0.25},
            "tokens": {"max_length": 160, "max_prompt_length": 80},
            "sft": {"enabled": False},
            "reward": {"source": "sentiment"},
            "policies": {"DPO": {"method": "dpo", **SIZES}},
            "evaluate": {"prompts": 2, "samples_per_prompt": 1, "sampling": SAMPLING, "precision": "fp32"},
        }
        return _merged(copy.deepcopy(good), changes)

    def run(self, *arguments: str, **changes: Any) -> list[str]:
        """`dpo run` on the changed recipe."""
        return ["run", self.file("recipe.yaml", yaml.safe_dump(self.recipe_of(**changes))), *arguments]

    def run_on(self, rows: Rows, *arguments: str, **changes: Any) -> list[str]:
        """`dpo run` on other rows."""
        return self.run_with("rows.jsonl", lines(rows), *arguments, **changes)

    def run_with(self, file: str, content: str | bytes, /, *arguments: str, **changes: Any) -> list[str]:
        """`dpo run` on another data file."""
        data = {"path": self.file(file, content), **changes.pop("data", {})}
        return self.run(*arguments, data=data, **changes)

    def validate(self, file: str, content: str | bytes, *arguments: str) -> list[str]:
        """`dpo validate` on a data file, which reads it as a run does and starts no run."""
        return ["validate", self.file(file, content), *arguments]

    def run_model(self, change: Callable[[Path], object], **changes: Any) -> list[str]:
        """`dpo run` on a copy of the model with something done to it."""
        return self.run(model={"name": self.changed_model(change)}, **changes)

    def changed_model(self, change: Callable[[Path], object]) -> str:
        """A copy of the model with something done to it."""
        copied = self.new_folder() / "model"
        shutil.copytree(self.model, copied)
        change(copied)
        return str(copied)

    def run_reward(self, code: str, **changes: Any) -> list[str]:
        """`dpo run` under a reward of one's own, on prompts, so that samples are labelled first of all."""
        # Other prompts for each case: what an earlier one left in the store must not shorten this one's way.
        prompts = lines([{"prompt": f"{row['prompt']} ({self._count})"} for row in good_rows()])
        source = self.file("own.py", code) + ":own"
        pairs = {"samples_per_prompt": 2, "sampling": SAMPLING}
        return self.run_with("prompts.jsonl", prompts, reward={"source": source}, pairs=pairs, **changes)

    def file(self, name: str, content: str | bytes) -> str:
        """A new file of that name in a folder of its own."""
        path = self.new_folder() / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def new_folder(self) -> Path:
        self._count += 1
        folder = self.folder / f"case-{self._count}"
        folder.mkdir()
        return folder

    def store(self) -> dict[str, tuple[int, int]]:
        """Size and inode of every file of the store and the reference cache; a use changes its time."""
        found = {}
        for root in ("store/objects", "store/index", "reference_cache"):
            for path in sorted((self.workspace / root).rglob("*")):
                if path.is_file():
                    stat = path.stat()
                    found[str(path.relative_to(self.workspace))] = (stat.st_size, stat.st_ino)
        return found

    def unfinished(self) -> list[str]:
        """What no run may leave behind: temporary parts of the store, and records of runs still `running`."""
        left = [str(p) for p in (self.workspace / "store" / "tmp").glob("*")]
        for path in (self.workspace / "runs").glob("*/*"):
            if path.suffix == ".tmp" or (path.name == "run.json" and '"running"' in path.read_text()):
                left.append(str(path))
        return left


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        if value is None:
            base.pop(key, None)
        elif isinstance(value, dict) and isinstance(base.get(key), dict):
            _merged(base[key], value)
        else:
            base[key] = value
    return base


def stage_of(path: str) -> str | None:
    """The stage of an index entry's path in `World.store`; None for other files."""
    found = re.fullmatch(rf"store{os.sep}index{os.sep}([^{os.sep}]+){os.sep}[0-9a-f]+\.json", path)
    return found.group(1) if found else None
