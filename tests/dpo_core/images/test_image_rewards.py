"""Rewards that see images: Python functions, a real server, and ensembles of them."""

import base64
import io
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from dpo_core.data.tokens.config import TokenConfig
from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.errors import RecipeError, StageFailed
from dpo_core.images.scenes import draw, encode
from dpo_core.jobs.evaluate import _Evaluation
from dpo_core.models.load import load_tokenizer
from dpo_core.rewards.ensemble import Part, combine, parts
from dpo_core.rewards.functions import check_reward, load_reward, reward_identity
from dpo_core.rewards.http import TOKEN
from dpo_core.rewards.model import scorer
from tasks.recipe.read import load_recipe
from tests.support.sites.judge_server import Server
from tests.support.sites.judge_server import server as judge_server

__all__ = ["judge_server"]

CODE = """
def bright(prompts, images):
    return [sum(sum(p) for p in image.getdata()) / len(prompts[i]) for i, image in enumerate(images)]

def told(prompts, images, metadata):
    return [float(len(m)) + image.size[0] for m, image in zip(metadata, images)]

def length(prompts, completions):
    return [float(len(c)) for c in completions]
"""


@pytest.fixture
def server(judge_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.delenv(TOKEN, raising=False)
    judge_server.content = lambda asked: {"rewards": [_brightness(file) for file in asked["images"]]}
    return judge_server


def _brightness(file: str) -> float:
    return float(np.asarray(Image.open(io.BytesIO(base64.b64decode(file)))).sum())


@pytest.fixture
def mine(tmp_path: Path) -> str:
    file = tmp_path / "mine.py"
    file.write_text(CODE)
    return str(file)


@pytest.fixture(scope="module")
def drawn() -> list[np.ndarray]:
    """Four images of one code each."""
    empty = encode(np.stack([draw([])]))[0]
    return [np.where(np.arange(len(empty)) < 9 * k, 3 + k, empty) for k in range(4)]


@pytest.fixture(scope="module")
def tokenise(scenes_model: Path) -> Tokenise:
    return Tokenise(load_tokenizer(scenes_model), TokenConfig(max_length=88, max_prompt_length=24))


def sequences(drawn: list[np.ndarray]) -> list[TokenSequence]:
    return [TokenSequence((1,), tuple(map(int, image))) for image in drawn]


def test_a_function_with_a_parameter_images_sees_pixels_and_metadata(
    mine: str, tokenise: Tokenise, drawn: list[np.ndarray]
) -> None:
    prompts = ["a ring", "a ring", "a photo", "a photo"]
    bright = scorer(f"{mine}:bright", tokenise, "fp32")(sequences(drawn), prompts)
    assert bright[0] == 0 < bright[1]
    told = scorer(f"{mine}:told", tokenise, "fp32", metadata={"a ring": "{}"})(sequences(drawn), prompts)
    assert told == [18, 18, 16, 16]
    texts = scorer(f"{mine}:length", tokenise, "fp32")(sequences(drawn), prompts)
    assert texts == [len(" ".join(map(str, image))) for image in drawn]
    with pytest.raises(StageFailed, match="sees images, and the completions are text"):
        load_reward(f"{mine}:bright")(["p"], ["text"])
    check_reward(f"{mine}:bright", images=True)
    with pytest.raises(RecipeError, match="sees images, and the completions are text"):
        check_reward(f"{mine}:bright")


def test_a_server_gets_png_files_and_metadata(
    server: Server, tokenise: Tokenise, drawn: list[np.ndarray]
) -> None:
    server.script = [(503, {}, b""), (429, {"retry-after": "0"}, b"")]
    score = scorer(server.url, tokenise, "fp32", metadata={"b": '{"tag": "x"}'})
    images, prompts = sequences(drawn * 20), ["a", "b"] * 40
    rewards = score(images, prompts)
    assert rewards[:4] == rewards[4:8]
    assert len(set(rewards)) == 4
    assert [len(a["prompts"]) for a in server.asked] == [64, 64, 64, 16]  # two of them again
    assert set(server.asked[-1]) == {"path", "prompts", "images", "metadata"}
    assert server.asked[-1]["metadata"] == ["", '{"tag": "x"}'] * 8


def test_a_server_of_images_that_refuses_or_miscounts_is_named(
    server: Server, tokenise: Tokenise, drawn: list[np.ndarray]
) -> None:
    check_reward(server.url, images=True)
    assert set(server.asked[0]) == {"path", "prompts", "images", "metadata"}
    server.content = lambda asked: [1.0]
    with pytest.raises(StageFailed, match="answered 1 rewards for 4 images"):
        scorer(server.url, tokenise, "fp32")(sequences(drawn), ["a"] * 4)
    server.always = (404, {}, b"")
    with pytest.raises(RecipeError, match=r"the check of reward\.source failed"):
        check_reward(server.url, images=True)


def test_an_ensemble_is_z_scored_within_the_samples_of_a_prompt(
    server: Server, mine: str, tokenise: Tokenise, drawn: list[np.ndarray]
) -> None:
    source = f"0.75 * {mine}:length + 2 * {server.url}"
    order = [drawn[i] for i in (0, 1, 2, 3, 3, 1)]
    prompts = ["a"] * 4 + ["b"] * 2
    singles = [scorer(part.source, tokenise, "fp32")(sequences(order), prompts) for part in parts(source)]
    expected: list[float] = []
    for group in (slice(0, 4), slice(4, 6)):
        zs = [
            [(v - statistics.fmean(r[group])) / (statistics.pstdev(r[group]) or 1) for v in r[group]]
            for r in singles
        ]
        expected += [0.75 * a + 2 * b for a, b in zip(*zs, strict=True)]
    assert scorer(source, tokenise, "fp32")(sequences(order), prompts) == pytest.approx(expected)
    assert max(expected) > 0.5
    check_reward(source, images=True)
    identity = reward_identity(source)
    assert identity == f"0.75 * {reward_identity(f'{mine}:length')} + 2 * {server.url}"
    with pytest.raises(RecipeError, match="is an ensemble"):
        load_reward(source)


def test_equal_rewards_of_a_group_and_scales_have_no_effect() -> None:
    prompts = ["a", "a", "b", "b"]
    assert combine([[5, 5, 1, 2], [0, 1, 0, 1]], [1, 1], prompts) == [-1, 1, -2, 2]
    assert combine([[1, 2, 0, 3]], [-2], prompts) == combine([[7, 70, 3, 4]], [-2], prompts)
    assert combine([[4.0]], [1], ["a"]) == [0]


@pytest.mark.parametrize(
    "source", ["a.py:f + b.py:g", "0 * a.py:f + 1 * b.py:g", "nan * a.py:f + 1 * b.py:g", "1 * + 2 * b.py:g"]
)
def test_a_term_that_is_no_weight_and_reward_is_refused(source: str) -> None:
    with pytest.raises(RecipeError, match="is not a weight and a reward"):
        parts(source)
    assert parts("a file + with.py:f".replace(" + ", "+")) == [Part(1, "a file+with.py:f")]


@pytest.mark.parametrize(
    "changes",
    [
        ["policies.P.method=ppo"],
        ["policies.P.method=grpo", "policies.P.reward=model"],
    ],
)
def test_methods_that_need_a_reward_of_single_samples_refuse_an_ensemble(changes: list[str]) -> None:
    ensemble = "reward.source=1 * a.py:f + 1 * b.py:g"
    grpo = ["policies={P: {method: grpo}}", "candidate=P", ensemble]
    assert load_recipe("demo", grpo).reward.source == ensemble.partition("=")[2]
    with pytest.raises((RecipeError, ValidationError), match="an ensemble compares the samples"):
        load_recipe("demo", [*grpo, *changes])


def test_policies_are_measured_by_an_ensemble_on_the_samples_of_all_together() -> None:
    prompts = [((1,), "a"), ((2,), "b")]
    worse, better = (
        SimpleNamespace(prompt_index=[0, 0, 1, 1], sequences=values, rewards=[])
        for values in ([0, 1, 0, 1], [2, 3, 0, 1])
    )
    measured: Any = SimpleNamespace(samples={"worse": worse, "better": better}, prompts=prompts)

    def score(sequences: Any, asked: Any) -> list[float]:
        return combine([sequences], [1], asked)

    _Evaluation._score_together(measured, score)
    spread = statistics.pstdev(range(4))
    assert worse.rewards == pytest.approx([-1.5 / spread, -0.5 / spread, -1, 1])
    assert better.rewards == pytest.approx([0.5 / spread, 1.5 / spread, -1, 1])
