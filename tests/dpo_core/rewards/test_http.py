"""An HTTP reward against a real server: order, batches, and answers that are no rewards."""

from pathlib import Path
from typing import Any

import pytest

from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.errors import RecipeError, StageFailed
from dpo_core.models.load import load_tokenizer
from dpo_core.rewards.functions import check_reward, load_reward, reward_identity
from dpo_core.rewards.http import TOKEN
from dpo_core.rewards.model import scorer
from tests.support.sites.judge_server import Server
from tests.support.sites.judge_server import server as judge_server

__all__ = ["judge_server"]


def lengths(asked: dict[str, Any]) -> Any:
    return {
        "rewards": [
            len(p) + len(c) / 100 for p, c in zip(asked["prompts"], asked["completions"], strict=True)
        ]
    }


@pytest.fixture
def server(judge_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.delenv(TOKEN, raising=False)
    judge_server.content = lengths
    return judge_server


def test_answers_come_in_order_over_several_batches(server: Server, monkeypatch) -> None:
    monkeypatch.setenv(TOKEN, "a-token")
    prompts, completions = ["p" * i for i in range(150)], ["c" * (150 - i) for i in range(150)]
    reward = load_reward(server.url)
    assert reward.name == server.url
    assert reward(prompts, completions) == [i + (150 - i) / 100 for i in range(150)]
    assert [len(a["prompts"]) for a in server.asked] == [64, 64, 22]
    assert [p for a in server.asked for p in a["prompts"]] == prompts
    assert [c for a in server.asked for c in a["completions"]] == completions
    assert server.headers[0]["content-type"] == "application/json"
    assert server.headers[0]["authorization"] == "Bearer a-token"
    assert reward([], []) == []
    assert len(server.asked) == 3


def test_a_bare_list_is_an_answer_and_text_of_any_kind_arrives(server: Server) -> None:
    server.content = lambda asked: [float(len(c)) for c in asked["completions"]]
    assert load_reward(server.url)(["Prüfung 😀"] * 2, ['"\n', ""]) == [2.0, 0.0]
    assert server.asked[0]["prompts"] == ["Prüfung 😀"] * 2
    assert server.asked[0]["completions"] == ['"\n', ""]


def test_the_number_of_rewards_is_checked_in_each_request(server: Server) -> None:
    # In all as many as asked for, and shifted: only a look at each request finds it.
    server.content = lambda asked: [1.0] * (65 if len(server.asked) == 1 else 63)
    with pytest.raises(StageFailed, match="answered 65 rewards for 64 completions"):
        load_reward(server.url)(["p"] * 128, ["c"] * 128)


@pytest.mark.parametrize("bad", [float("nan"), None, "0.5"])
def test_a_reward_that_is_no_number_is_named_with_its_row(server: Server, bad: Any) -> None:
    server.content = lambda asked: {"rewards": [bad if c == "third" else 1.0 for c in asked["completions"]]}
    with pytest.raises(StageFailed, match="for row 2"):
        load_reward(server.url)(["p"] * 3, ["first", "second", "third"])


@pytest.mark.parametrize("body", [b"<html>hello</html>", b'{"scores": [1]}', b"1.0", b"", b"[" * 200_000])
def test_an_answer_without_rewards_is_shown(server: Server, body: bytes) -> None:
    server.always = (200, {}, body)
    with pytest.raises(StageFailed, match="answered without rewards") as caught:
        load_reward(server.url)(["p"], ["c"])
    assert body[:10].decode() in caught.value.problem
    assert '{"rewards": [numbers]}' in caught.value.remedy


def test_a_wrong_address_is_refused_before_anything_is_trained(server: Server) -> None:
    with pytest.raises(RecipeError, match="not a server address"):
        load_reward("http://host:port/x")
    server.always = (404, {}, b"")
    with pytest.raises(RecipeError, match=r"the check of reward\.source failed: the reward at http"):
        check_reward(server.url)


def test_it_is_taken_wherever_a_known_reward_is(server: Server, tiny: Path) -> None:
    check_reward(server.url)
    assert server.asked[0]["completions"][1] == "", "the trial asks for the empty completion too"
    assert reward_identity(server.url) == server.url
    tokenizer = load_tokenizer(tiny)
    completion = (*tokenizer.encode("ab"), tokenizer.eos_token_id)
    score = scorer(server.url, tokenizer, "fp32")
    assert score([TokenSequence((1,), completion)], ["pp"]) == [2.02]
    asked = server.asked[-1]
    assert (asked["prompts"], asked["completions"]) == (["pp"], ["ab"]), "the text without its end token"
