"""A local HTTP server that answers as a judge (OpenAI's chat completions), or as a test says."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from dpo_core.judging.client import KEY, Endpoint
from dpo_core.judging.config import JudgeConfig

Answer = tuple[int, dict[str, str], bytes]
_SHOWN = re.compile(r"\[\w+ A\]\n(.*?)\n\[End of .*? A\].*\[\w+ B\]\n(.*?)\n\[End of", re.DOTALL)


def shown(asked: dict[str, Any]) -> tuple[str, str]:
    """The two answers that a question shows, in its order."""
    found = _SHOWN.search(asked["messages"][0]["content"])
    assert found, "a judge is shown two answers"
    return found.group(1), found.group(2)


def longer_wins(asked: dict[str, Any]) -> str:
    first, second = shown(asked)
    return f"Comparison: one says more.\n**Preferred:** {'A' if len(first) >= len(second) else 'B'}"


@dataclass
class Server:
    """`judge` writes a judge's reply, or `content` the whole answer; the first requests get what stands in
    `script`, or all get `always`."""

    url: str = ""
    judge: Callable[[dict[str, Any]], str] = longer_wins
    content: Callable[[dict[str, Any]], Any] | None = None
    script: list[Answer | str] = field(default_factory=list)
    always: Answer | str | None = None
    usage: dict[str, Any] | None = field(
        default_factory=lambda: {"prompt_tokens": 100, "completion_tokens": 10}
    )
    delay: float = 0.0
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_once: int = 0
    _now: int = 0

    def endpoint(self, **settings: Any) -> Endpoint:
        return Endpoint(**({"base_url": self.url, "model": "rule", "retries": 1, "timeout": 5} | settings))

    def config(self, *, template: str = "summary", both_orders: bool = True, unusable: float = 0.2,
               **settings: Any) -> JudgeConfig:  # fmt: skip
        return JudgeConfig(
            kind="llm",
            endpoint=self.endpoint(**settings),
            template=template,
            both_orders=both_orders,
            unusable=unusable,
        )


DROP = "drop the connection"


def completion(text: str | None, usage: dict[str, Any] | None = None) -> bytes:
    message = {"role": "assistant", "content": text}
    body = {"id": "x", "object": "chat.completion", "choices": [{"index": 0, "message": message}]}
    return json.dumps(body | ({"usage": usage} if usage else {})).encode()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv(KEY, raising=False)
    state, lock = Server(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet: TCP holds a second small one back for 40 ms

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                state.times.append(time.monotonic())
                state.asked.append(asked | {"path": self.path})
                state.headers.append({k.lower(): v for k, v in self.headers.items()})
                state._now += 1
                state.most_at_once = max(state.most_at_once, state._now)
                scripted = state.script.pop(0) if state.script else state.always
            time.sleep(state.delay)
            if scripted is None:
                body = (
                    completion(state.judge(asked), state.usage)
                    if state.content is None
                    else json.dumps(state.content(asked)).encode()
                )
                answer: Answer = (200, {}, body)
            elif isinstance(scripted, str):
                with lock:
                    state._now -= 1
                self.close_connection = True
                return
            else:
                answer = scripted
            status, headers, body = answer
            with lock:
                state._now -= 1
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json"} | headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Listening(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that stopped waiting

    with Listening(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        state.url = f"http://127.0.0.1:{listening.server_port}/v1"
        yield state
        listening.shutdown()
        thread.join()
