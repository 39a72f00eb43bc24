"""The judge's client against a real server: retries, refusals and error messages."""

import json
import logging
import socket
import traceback
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from dpo_core.errors import DpoError, RecipeError, StageFailed
from dpo_core.judging.client import KEY, Endpoint, Judge
from dpo_core.judging.judge import judge_answers
from tests.support.sites.judge_server import DROP, Server, completion

QUESTION = [{"role": "user", "content": "[Summary A]\nlong\n[End of A]\n[Summary B]\nx\n[End of B]"}]


def ask(server: Server, **settings: Any) -> Any:
    server.judge = lambda asked: "Preferred: A"
    with Judge(server.endpoint(**settings)) as judge:
        return judge.ask(QUESTION)


def failure(server: Server, **settings: Any) -> StageFailed:
    with pytest.raises(StageFailed) as caught:
        ask(server, **settings)
    assert caught.value.problem.startswith(f"the judge at {server.url} ")
    return caught.value


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


def test_429_is_asked_again_when_the_server_says(server: Server) -> None:
    server.script = [(429, {"Retry-After": "0.7"}, b"{}")]
    assert ask(server).text == "Preferred: A"
    assert server.times[1] - server.times[0] >= 0.7


@pytest.mark.parametrize("passing", [(500, {}, b"oh"), (503, {}, b""), DROP])
def test_what_may_pass_is_asked_again(server: Server, passing: Any) -> None:
    server.script = [passing]
    assert ask(server).text == "Preferred: A"
    assert len(server.asked) == 2


def test_429_for_ever(server: Server) -> None:
    server.always = (429, {"Retry-After": "0.01"}, b'{"error": {"message": "slow down"}}')
    error = failure(server, retries=2)
    assert len(server.asked) == 3
    assert "answered 429" in error.problem
    assert "slow down" in error.problem
    assert "concurrency" in error.remedy
    assert "run again" in error.remedy
    server.asked.clear()
    server.always = (429, {"Retry-After": "3600"}, b"quota")
    assert "retry after 3600 s" in failure(server).problem
    assert len(server.asked) == 1, "nobody waits an hour"


def test_a_slow_judge(server: Server) -> None:
    server.delay = 0.6
    error = failure(server, timeout=0.2)
    assert error.problem.endswith("did not answer within 0.2 s, tried 2 times")
    assert "timeout" in error.remedy
    assert len(server.asked) == 2


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as taken:  # bound and not listening: nobody else can take the port
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with (
            Judge(Endpoint(base_url=url, model="m", retries=0)) as judge,
            pytest.raises(StageFailed, match=r"could not be reached, tried once .*refused") as caught,
        ):
            judge.ask(QUESTION)
        assert "a server runs at that address" in caught.value.remedy


@pytest.mark.parametrize(
    ("status", "requests", "said", "remedy"),
    [
        (401, 1, "answered 401: 'no'", f"the required key into the environment variable {KEY}"),
        (403, 1, "answered 403: 'no'", KEY),
        (404, 1, "answered 404: 'no'", "a model named 'rule', and that base_url ends as"),
        (402, 1, "answered 402: 'no'", "the endpoint's documentation"),
        (500, 2, "answered 500: 'no', tried 2 times", "run again"),
        (DROP, 2, "could not be reached, tried 2 times", "a server runs"),
    ],
)
def test_a_failure_names_its_remedy(
    server: Server, status: Any, requests: int, said: str, remedy: str
) -> None:
    server.always = status if status == DROP else (status, {}, b"no")
    error = failure(server)
    assert said in error.problem
    assert remedy in error.remedy
    assert len(server.asked) == requests


def test_a_redirect_is_not_followed(server: Server) -> None:
    server.always = (307, {"Location": "http://127.0.0.1:1/elsewhere"}, b"")
    assert "http://127.0.0.1:1/elsewhere" in failure(server).remedy
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refusal_of_one_question_is_a_reply_of_its_own_kind(server: Server, status: int) -> None:
    server.always = (status, {}, b'{"error": "too long"}')
    reply = ask(server)
    assert reply.text == ""
    assert reply.refused == f'answered {status}: \'{{"error": "too long"}}\''


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
    for kind in ("application/json", "text/html"):
        server.always = (200, {"Content-Type": kind}, body)
        error = failure(server)
        assert "answered without a reply" in error.problem
        assert body.decode(errors="replace")[:20] in error.problem
        assert "chat completions" in error.remedy


def test_a_reply_of_no_words_is_a_reply(server: Server) -> None:
    server.always = (200, {}, completion(None))
    assert ask(server).text == ""


CANARY = "sk-canary-7f3a91"


@pytest.mark.filterwarnings("ignore")
def test_the_key_is_sent_and_never_written(
    server: Server, tmp_path: Path, monkeypatch, caplog, capsys
) -> None:
    monkeypatch.setenv(KEY, CANARY)
    echo, body = (
        {"X-Echo": CANARY, "X-Request-Id": CANARY, "Retry-After": "0.01"},
        f"key {CANARY} is bad".encode(),
    )
    long = ("." * 235 + CANARY).encode()  # where a quotation is cut, half of it must not remain
    answers: list[Any] = [None, DROP, (200, echo, body), (200, echo, long), (200, echo, completion(CANARY))]
    answers += [(status, echo, body) for status in (302, 400, 401, 403, 404, 418, 422, 429, 500)]
    answers += [
        (307, echo | {"Location": f"http://x/?key={CANARY}"}, b""),
        (429, {"Retry-After": CANARY}, long),
    ]
    written: list[str] = []
    handler = logging.FileHandler(tmp_path / "all.log")
    handler.setFormatter(logging.Formatter("%(name)s %(message)s %(args)s"))
    logging.getLogger().addHandler(handler)
    with caplog.at_level(logging.DEBUG):
        for number, answer in enumerate(answers):
            server.always = answer
            config = server.config(template="dialogue", unusable=1.0 if number % 2 else 0.2, concurrency=1)
            try:
                judged = judge_answers(
                    config, [f"p{number}"] * 2, ["a", "b"], ["c", "d"], cache=tmp_path / "cache"
                )
                written.append(repr(judged))
            except DpoError as error:
                logging.getLogger("test").exception("failed")
                written += [str(error), repr(error), "".join(traceback.format_exception(error))]
                written += [repr(error.__cause__), repr(error.__context__)]
        server.always, server.delay = None, 0.4
        with Judge(server.endpoint(timeout=0.1)) as judge, pytest.raises(StageFailed) as slow:
            judge.ask(QUESTION)
        written += [repr(judge), str(judge), "".join(traceback.format_exception(slow.value))]
        config = server.config()
        written += [repr(config), config.model_dump_json(), yaml.safe_dump(config.model_dump()), str(config)]
    logging.getLogger().removeHandler(handler)
    handler.close()
    assert {h.get("authorization") for h in server.headers} == {f"Bearer {CANARY}"}, "and the key was sent"
    log = (tmp_path / "all.log").read_text()
    assert "httpcore" in log, "the transport was heard at DEBUG"
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 4
    captured = capsys.readouterr()
    everything = "\n".join([*written, *files, caplog.text, captured.out, captured.err])
    assert CANARY[:5] not in everything
    assert "key … is bad" in everything, "the server's words are shown without it"


def test_the_filter_leaves_with_the_judge(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, CANARY)
    before = list(logging.getLogger("httpcore.http11").filters)
    ask(server)
    assert logging.getLogger("httpcore.http11").filters == before


class Recipe(BaseModel):
    """As a recipe nests it: pydantic's own errors would quote what was given."""

    endpoint: Endpoint


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("key_env", "sk-proj-s3cret", "not the name of an environment variable"),
        ("key_env", "s3cret", "not the name of an environment variable"),
        ("base_url", "http://me:s3cret@host/v1", "credentials or a query"),
        ("base_url", "https://host/v1?api_key=s3cret", "credentials or a query"),
        ("base_url", "s3cret", "not a server address"),
        ("base_url", "ftp://s3cret", "not a server address"),
        ("base_url", "http://host:99999/s3cret", "not a server address"),
        ("base_url", "http://ho st/s3cret", "not a server address"),
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
