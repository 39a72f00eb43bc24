"""The judge's client against a real server: retries, refusals and error messages."""

import json
import logging
import traceback
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from dpo_core.errors import RecipeError, StageFailed
from dpo_core.judging.client import KEY, Endpoint, Judge
from dpo_core.judging.judge import judge_answers
from tests.support.sites.judge_server import Server, completion

QUESTION = [{"role": "user", "content": "[Summary A]\nlong\n[End of A]\n[Summary B]\nx\n[End of B]"}]


def ask(server: Server, **settings: Any) -> Any:
    server.judge = lambda asked: "Preferred: A"
    return Judge(server.endpoint(**settings)).ask(QUESTION)


def test_what_is_sent_and_what_comes_back(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "for-another-server")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-of-another-server")
    reply = ask(server, max_tokens=77)
    assert (reply.text, reply.tokens_in, reply.tokens_out) == ("Preferred: A", 100, 10)
    [asked] = server.asked
    assert asked == {
        "path": "/v1/chat/completions",
        "model": "rule",
        "messages": QUESTION,
        "temperature": 0,
        "max_tokens": 77,
    }
    assert "another-server" not in str(server.headers)
    assert "authorization" not in server.headers[0]


def test_what_newer_models_want_instead(server: Server) -> None:
    ask(server, temperature=None, token_field="max_completion_tokens", max_tokens=5)
    assert "temperature" not in server.asked[0]
    assert "max_tokens" not in server.asked[0]
    assert server.asked[0]["max_completion_tokens"] == 5


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": None}, {"total_tokens": 3}])
def test_a_server_need_not_count_tokens(server: Server, usage: dict[str, Any] | None) -> None:
    server.usage = usage
    reply = ask(server, price_in=1)
    assert reply.text == "Preferred: A"
    assert server.endpoint(price_in=1).cost(reply) is None


def test_cost_is_tokens_times_prices_per_million(server: Server) -> None:
    reply = ask(server)
    assert server.endpoint().cost(reply) is None
    assert server.endpoint(price_in=2.5, price_out=10).cost(reply) == pytest.approx(100 * 2.5e-6 + 10 * 10e-6)
    assert server.endpoint(price_out=10).cost(reply) == pytest.approx(1e-4)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refusal_of_one_question_is_a_reply_of_its_own_kind(server: Server, status: int) -> None:
    server.always = (status, {}, b'{"error": "too long"}')
    reply = ask(server)
    assert reply.text == ""
    assert reply.refused == f'answered {status}: \'{{"error": "too long"}}\''


@pytest.mark.parametrize(
    ("answer", "remedies"),
    [
        ((404, {}, b""), ["named 'tiny-judge'", "in /v1"]),
        ((429, {}, b""), ["concurrency", "quota"]),
        (None, ["timeout", "concurrency"]),
    ],
)
def test_an_error_names_the_setting_to_change(server: Server, answer: Any, remedies: list[str]) -> None:
    server.always, server.delay = answer, 0 if answer else 0.5
    with pytest.raises(StageFailed) as caught:
        ask(server, model="tiny-judge", timeout=0.2 if answer is None else 5, retries=0)
    assert all(word in caught.value.remedy for word in remedies)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>Welcome</html>",
        b"[]",
        b"{}",
        b'{"choices": []}',
        b'{"choices": null, "error": {"message": "upstream is down"}}',
        b'{"choices": [{"text": "Preferred: A"}]}',
        b'{"choices": [{"message": {"content": ["A"]}}]}',
        b'{"choices": [{"message": {"content": "cut',
        b"\xff\xfe",
    ],
)
def test_an_answer_without_a_reply_is_shown(server: Server, body: bytes) -> None:
    server.always = (200, {}, body)
    with pytest.raises(StageFailed, match="answered without a reply") as caught:
        ask(server)
    assert body.decode(errors="replace")[:20] in caught.value.problem
    assert "chat completions" in caught.value.remedy


def test_a_reply_of_no_words_is_a_reply(server: Server) -> None:
    server.always = (200, {}, completion(None))
    assert ask(server).text == ""


CANARY = "sk-canary-7f3a91"


def test_the_key_is_in_no_reply_log_or_setting(server: Server, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setenv(KEY, CANARY)
    server.judge = lambda asked: f"{CANARY}\nPreferred: A"
    config = server.config(template="dialogue")
    with caplog.at_level(logging.DEBUG):
        judged = judge_answers(config, ["p"] * 2, ["a", "b"], ["c", "d"], cache=tmp_path)
    assert {h.get("authorization") for h in server.headers} == {f"Bearer {CANARY}"}
    files = [path.read_text() for path in tmp_path.rglob("*.json")]
    assert len(files) == 4
    assert CANARY[:5] not in "\n".join([repr(judged), *files, caplog.text, config.model_dump_json()])


class Recipe(BaseModel):
    """As a recipe nests it: pydantic's own errors would quote what was given."""

    endpoint: Endpoint


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("key_env", "sk-proj-s3cret", "not the name of an environment variable"),
        ("key_env", "s3cret", "not the name of an environment variable"),
        ("base_url", "http://me:s3cret@host/v1", "contains credentials"),
        ("base_url", "https://host/v1?api_key=s3cret", "contains a query"),
        ("base_url", "s3cret", "not a server address"),
    ],
)
def test_a_key_in_the_wrong_field_is_refused_and_not_repeated(field: str, value: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem) as caught:
        Recipe.model_validate({"endpoint": {"base_url": "http://h/v1", "model": "m"} | {field: value}})
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))


def test_a_key_that_is_none_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="is not set"):
        ask(server, key_env="MY_JUDGE")
    monkeypatch.setenv("MY_JUDGE", "s3cret\nX-Other: 1")
    with pytest.raises(RecipeError, match="MY_JUDGE contains characters") as caught:
        ask(server, key_env="MY_JUDGE")
    assert "s3cret" not in str(caught.value)
    monkeypatch.setenv("MY_JUDGE", " own-key \n")
    ask(server, key_env="MY_JUDGE")
    assert server.headers[-1]["authorization"] == "Bearer own-key"


def test_an_address_may_end_in_a_slash(server: Server) -> None:
    endpoint = Endpoint(base_url=server.url + "/", model="m")
    assert endpoint.base_url == server.url
    assert json.loads(endpoint.model_dump_json())["key_env"] == KEY
