"""An HTTP reward against a real server: answers, order, retries and refusals."""

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.errors import RecipeError, StageFailed
from dpo_core.models.load import load_tokenizer
from dpo_core.rewards.functions import CheckedReward, check_reward, load_reward, reward_identity
from dpo_core.rewards.http import TOKEN, HttpReward
from dpo_core.rewards.model import scorer

Answer = tuple[int, dict[str, str], bytes]


def lengths(asked: dict[str, Any]) -> Any:
    return {
        "rewards": [
            len(p) + len(c) / 100 for p, c in zip(asked["prompts"], asked["completions"], strict=True)
        ]
    }


@dataclass
class Server:
    """`answer` makes the JSON of a good answer; `script` is what the first requests get instead."""

    url: str = ""
    answer: Callable[[dict[str, Any]], Any] = lengths
    script: list[Answer] = field(default_factory=list)
    always: Answer | None = None
    delay: float = 0.0
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv(TOKEN, raising=False)
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.times.append(time.monotonic())
            state.asked.append(asked)
            state.headers.append({k.lower(): v for k, v in self.headers.items()})
            time.sleep(state.delay)
            good = (200, {}, json.dumps(state.answer(asked)).encode())
            status, headers, body = state.script.pop(0) if state.script else state.always or good
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            state.asked.append({"method": "GET"})
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        state.url = f"http://127.0.0.1:{listening.server_port}/score"
        yield state
        listening.shutdown()
        thread.join()


def quick(server: Server, **settings: Any) -> CheckedReward:
    """The reward with waits that a test can afford."""
    return CheckedReward(HttpReward(server.url, **({"first_wait": 0.05} | settings)), server.url)


def texts(count: int) -> tuple[list[str], list[str]]:
    return ["p" * i for i in range(count)], ["c" * (count - i) for i in range(count)]


def test_answers_come_in_order_over_several_batches(server: Server) -> None:
    prompts, completions = texts(150)
    reward = load_reward(server.url)
    assert reward.name == server.url
    assert reward(prompts, completions) == [i + (150 - i) / 100 for i in range(150)]
    assert [len(a["prompts"]) for a in server.asked] == [64, 64, 22]
    assert [p for a in server.asked for p in a["prompts"]] == prompts
    assert [c for a in server.asked for c in a["completions"]] == completions
    assert server.headers[0]["content-type"] == "application/json"
    assert reward([], []) == []
    assert len(server.asked) == 3


def test_a_bare_list_is_an_answer_and_text_of_any_kind_arrives(server: Server) -> None:
    server.answer = lambda asked: [float(len(c)) for c in asked["completions"]]
    assert load_reward(server.url)(["Prüfung 😀"] * 2, ['"\n', ""]) == [2.0, 0.0]
    assert server.asked[0] == {"prompts": ["Prüfung 😀"] * 2, "completions": ['"\n', ""]}


def test_a_server_that_is_busy_twice_is_asked_again_later(server: Server, caplog) -> None:
    server.script = [(503, {}, b"busy"), (429, {}, b"")]
    with caplog.at_level(logging.WARNING):
        assert quick(server)(["p"], ["cc"]) == [1.02]
    assert len(server.asked) == 3
    waits = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    assert 0.05 <= waits[0] < waits[1]
    assert waits[1] >= 0.1
    assert "answered 503 Service Unavailable; trying again in 0.1 s" in caplog.text


def test_a_server_may_say_how_long_it_wants_to_be_left_alone(server: Server) -> None:
    server.script = [(503, {"Retry-After": "0.3"}, b"")]
    quick(server)(["p"], ["c"])
    assert server.times[1] - server.times[0] >= 0.3


def test_a_server_that_fails_for_ever_is_given_up(server: Server) -> None:
    server.always = (500, {}, b"")
    with pytest.raises(StageFailed) as caught:
        quick(server, attempts=3)(["p"], ["c"])
    assert len(server.asked) == 3
    assert caught.value.problem == (
        f"the reward at {server.url} failed 3 times; the last time it answered 500 Internal Server Error"
    )
    assert "run again" in caught.value.remedy


@pytest.mark.parametrize(
    ("status", "word", "remedy"),
    [
        (404, "Not Found", "Check the address"),
        (400, "Bad Request", "documentation"),
        (401, "Unauthorized", TOKEN),
    ],
)
def test_a_refusal_is_not_tried_again(server: Server, status: int, word: str, remedy: str) -> None:
    server.always = (status, {}, b'{"detail": "no such route"}')
    with pytest.raises(StageFailed) as caught:
        quick(server)(["p"], ["c"])
    assert len(server.asked) == 1
    assert f'{server.url} answered {status} {word}: \'{{"detail": "no such route"}}\'' in caught.value.problem
    assert remedy in caught.value.remedy


def test_a_redirect_is_not_followed(server: Server) -> None:
    server.always = (302, {"Location": "http://127.0.0.1:1/elsewhere"}, b"")
    with pytest.raises(StageFailed, match="answered 302") as caught:
        quick(server)(["p"], ["c"])
    assert "http://127.0.0.1:1/elsewhere" in caught.value.remedy
    assert len(server.asked) == 1


def test_the_number_of_rewards_is_checked_in_each_request(server: Server) -> None:
    # In all as many as asked for, and shifted: only a look at each request finds it.
    server.answer = lambda asked: [1.0] * (3 if len(server.asked) == 1 else 1)
    with pytest.raises(StageFailed, match="answered 3 rewards for 2 completions"):
        quick(server, batch_size=2)(["p"] * 4, ["c"] * 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "0.5", [1.0]])
def test_a_reward_that_is_no_number_is_named_with_its_row(server: Server, bad: Any) -> None:
    server.answer = lambda asked: {"rewards": [bad if c == "third" else 1.0 for c in asked["completions"]]}
    with pytest.raises(StageFailed, match="for row 2") as caught:
        quick(server, batch_size=2)(["p"] * 3, ["first", "second", "third"])
    assert server.url in caught.value.problem
    assert "finite number" in caught.value.remedy


@pytest.mark.parametrize("body", [b"<html>hello</html>", b'{"scores": [1]}', b"1.0", b""])
def test_an_answer_without_rewards_is_shown(server: Server, body: bytes) -> None:
    server.always = (200, {}, body)
    with pytest.raises(StageFailed, match="answered without rewards") as caught:
        quick(server)(["p"], ["c"])
    assert body[:10].decode() in caught.value.problem
    assert '{"rewards": [numbers]}' in caught.value.remedy
    assert len(server.asked) == 1


def test_no_server_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as taken:  # bound and not listening: nobody else can take the port
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/score"
        with pytest.raises(
            StageFailed, match=r"failed 2 times; the last time it could not be reached .*refused"
        ):
            HttpReward(url, attempts=2, first_wait=0.01)(["p"], ["c"])
        start = time.monotonic()
        with pytest.raises(RecipeError, match=r"the check of reward\.source failed: the reward at http"):
            check_reward(url)
        assert time.monotonic() - start < 40


def test_a_server_that_closes_without_a_word_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    complete = b"HTTP/1.0 200 OK\r\n\r\n[0.5]"
    answers = [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n[1.0", complete]
    served = []

    def serve(listening: socket.socket) -> None:
        for answer in answers:
            connection, _ = listening.accept()
            with connection, connection.makefile("rb") as request:
                size = 0
                while (line := request.readline()) != b"\r\n":
                    if line.lower().startswith(b"content-length:"):
                        size = int(line.split(b":")[1])
                served.append(request.read(size))  # all of it: closing on unread bytes would reset
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        assert HttpReward(url, first_wait=0.01)(["p"], ["c"]) == [0.5]
        thread.join()
    assert len(served) == 3


def test_a_slow_server_is_not_waited_for_longer_than_said(server: Server) -> None:
    server.delay = 0.6
    with pytest.raises(StageFailed, match=r"failed 2 times; the last time it did not answer within 0\.2 s"):
        quick(server, timeout=0.2, attempts=2)(["p"], ["c"])
    assert len(server.asked) == 2


def test_the_token_is_sent_and_never_said(server: Server, monkeypatch, caplog) -> None:
    quick(server)(["p"], ["c"])
    assert "authorization" not in server.headers[0]
    monkeypatch.setenv(TOKEN, "s3cret-t0ken")
    server.script = [(503, {"X-Echo": "s3cret-t0ken"}, b"s3cret-t0ken")]
    with caplog.at_level(logging.DEBUG):
        quick(server)(["p"], ["c"])
        assert [h["authorization"] for h in server.headers[1:]] == ["Bearer s3cret-t0ken"] * 2
        server.always = (403, {}, b"the token s3cret-t0ken is unknown")
        with pytest.raises(StageFailed) as caught:
            quick(server)(["p"], ["c"])
    assert "the token … is unknown" in caught.value.problem
    assert "s3cret" not in str(caught.value) + caplog.text
    monkeypatch.setenv(TOKEN, "s3cret\nX-Other: 1")
    with pytest.raises(RecipeError, match=TOKEN) as bad:
        quick(server)(["p"], ["c"])
    assert "s3cret" not in str(bad.value)


@pytest.mark.parametrize(
    "url", ["http://", "http://:80/x", "https://host:port/x", "http://a b/x", "http://[::1/x"]
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(RecipeError, match="not a server address"):
        load_reward(url)


def test_credentials_in_the_address_are_refused_and_not_repeated() -> None:
    with pytest.raises(RecipeError, match="contains credentials") as caught:
        load_reward("https://me:hunter2@host/score")
    assert "hunter2" not in str(caught.value)
    assert TOKEN in caught.value.remedy


def test_it_is_taken_wherever_a_known_reward_is(server: Server, tiny: Path) -> None:
    check_reward(server.url)
    assert server.asked[0]["completions"][1] == "", "the trial asks for the empty completion too"
    assert reward_identity(server.url) == server.url
    tokenizer = load_tokenizer(tiny)
    completion = (*tokenizer.encode("ab"), tokenizer.eos_token_id)
    score = scorer(server.url, tokenizer, "fp32")
    assert score([TokenSequence((1,), completion)], ["pp"]) == [2.02]
    assert server.asked[-1] == {"prompts": ["pp"], "completions": ["ab"]}, "the text without its end token"
