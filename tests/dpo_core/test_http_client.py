"""The HTTP client against a real server: what is asked again, errors, secrets, proxies and certificates."""

import datetime
import logging
import re
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Iterator
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_core.errors import RecipeError
from dpo_core.http_client import Answer, JsonServer, RequestFailed, usable_address
from tests.support.sites.judge_server import DROP, Server, server

__all__ = ["server"]
TOKEN = "A_TOKEN"


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits of the client, which are not slept."""
    slept: list[float] = []
    monkeypatch.setattr("dpo_core.http_client.time", SimpleNamespace(sleep=slept.append, time=time.time))
    return slept


def post(url: str, timeout: float = 5, retries: int = 2) -> bytes:
    server = JsonServer(
        "the server", url, address_field="a.source", token=TOKEN, timeout=timeout, retries=retries
    )
    return server.post({"text": "\ud800 é"})


def failure(url: str, **settings: Any) -> RequestFailed:
    with pytest.raises(RequestFailed) as caught:
        post(url, **settings)
    assert caught.value.problem.startswith("the server ")
    return caught.value


@pytest.mark.parametrize("passing", [(408, {}, b""), (429, {}, b""), (500, {}, b"oh"), (503, {}, b""), DROP])
def test_what_may_pass_is_asked_again_later(server: Server, waits: list[float], passing: Any) -> None:
    server.script = [passing, passing]
    server.content = lambda asked: asked["text"]
    assert post(server.url) == b'"\\ud800 \\u00e9"'
    assert len(server.asked) == 3
    assert 0.35 <= waits[0] <= 0.5 < waits[1] <= 1
    server.script = [passing] * 3
    error = failure(server.url)
    assert "tried 3 times" in error.problem
    assert "run again" in error.remedy
    assert error.status == (0 if passing == DROP else passing[0])


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (400, "Check a.source and the server's documentation"),
        (401, f"the environment variable {TOKEN}"),
        (403, TOKEN),
        (404, "Check a.source"),
        (302, "Set a.source to the redirect's target: http://127.0.0.1:1/elsewhere"),
    ],
)
def test_a_refusal_is_not_tried_again(server: Server, status: int, remedy: str) -> None:
    server.always = (status, {"Location": "http://127.0.0.1:1/elsewhere"}, b'{"detail": "no"}')
    error = failure(server.url)
    assert error.problem == f'the server answered {status}: \'{{"detail": "no"}}\''
    assert remedy in error.remedy
    assert len(server.asked) == 1


def test_a_server_may_say_how_long_to_wait(server: Server, waits: list[float]) -> None:
    server.script = [(429, {"Retry-After": "0.7"}, b"{}")]
    server.content = lambda asked: {}
    post(server.url)
    assert waits == [0.7]
    waits.clear()
    server.always = (429, {"Retry-After": "3600"}, b"quota")
    assert failure(server.url).problem.endswith("'quota', tried 3 times, retry after 3600 s")
    assert waits == [120, 120], "nobody waits an hour"
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=3600)
    server.always = (503, {"Retry-After": format_datetime(later)}, b"")
    assert re.search(r"retry after 3[56]\d\d s$", failure(server.url).problem)


def test_a_server_may_say_that_it_is_of_no_use_to_try_again(server: Server, waits: list[float]) -> None:
    server.always = (429, {"x-should-retry": "false"}, b"insufficient_quota")
    assert "tried" not in failure(server.url).problem
    assert waits == []


def test_a_retry_is_a_warning(server: Server, caplog) -> None:
    server.script = [(503, {}, b"")]
    server.content = lambda asked: {}
    post(server.url)
    (record,) = (record for record in caplog.records if "trying again" in record.message)
    assert record.levelno == logging.WARNING


def test_a_server_may_say_it_in_several_ways() -> None:
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=60)
    said = [("", 0), ("2.5", 2.5), (format_datetime(later), 60), ("-1", 0), ("nan", 0), ("soon", 0)]
    for header, seconds in said:
        answer = Answer("answered 503", headers={"retry-after": header})
        assert answer.retry_after == pytest.approx(seconds, abs=5e-3 + seconds / 20)


def test_a_slow_server_and_none(server: Server) -> None:
    server.delay = 0.6
    assert failure(server.url, timeout=0.2, retries=1).problem == (
        "the server did not answer within 0.2 s, tried 2 times"
    )
    with socket.socket() as taken:  # bound and not listening: nobody else can take the port
        taken.bind(("127.0.0.1", 0))
        error = failure(f"http://127.0.0.1:{taken.getsockname()[1]}/v1", retries=0)
    assert "could not be reached" in error.problem
    assert "refused" in error.problem


@pytest.mark.parametrize(("status", "problem"), [(403, "answered 403"), (200, "could not be reached")])
def test_a_refusal_whose_text_is_cut_off_is_a_refusal(listening, status: int, problem: str) -> None:
    def cut(handler: BaseHTTPRequestHandler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.send_response(status)
        handler.send_header("Content-Length", "99")
        handler.end_headers()
        handler.wfile.write(b"not allo")

    listening.RequestHandlerClass.do_POST = cut
    assert problem in failure(f"http://127.0.0.1:{listening.server_port}/x", retries=0).problem


CANARY = "sk-canary-7f3a91"


def test_the_token_is_sent_and_never_written(server: Server, monkeypatch, caplog) -> None:
    monkeypatch.setenv(TOKEN, f" {CANARY}\n")
    echo = {"X-Echo": CANARY, "Retry-After": "0.01", "Location": f"http://x/?key={CANARY}"}
    body = f"key {CANARY} is bad".encode()
    long = ("." * 235 + CANARY).encode()  # where a quotation is cut, half of it must not remain
    answers: list[Any] = [(status, echo, body) for status in (302, 400, 401, 429, 500)]
    answers += [DROP, (400, echo, long), (429, {"Retry-After": CANARY}, long)]
    written = []
    with caplog.at_level(logging.DEBUG):
        for answer in answers:
            server.always = answer
            error = failure(server.url, retries=1)
            written += [str(error), repr(error), "".join(traceback.format_exception(error))]
            written += [repr(error.__cause__), repr(error.__context__)]
    assert {h["authorization"] for h in server.headers} == {f"Bearer {CANARY}"}, "and it was sent"
    everything = "\n".join([*written, caplog.text])
    assert CANARY[:5] not in everything
    assert "key … is bad" in everything, "the server's words are shown without it"
    monkeypatch.setenv(TOKEN, f"{CANARY}\nX-Other: 1")
    with pytest.raises(RecipeError, match=f"{TOKEN} contains characters") as caught:
        post(server.url)
    assert CANARY[:5] not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("s3cret", "not a server address"),
        ("ftp://s3cret", "not a server address"),
        ("http://", "not a server address"),
        ("http://:80/x", "not a server address"),
        ("http://host:99999/s3cret", "not a server address"),
        ("http://ho st/s3cret", "not a server address"),
        ("http://[::1/x", "not a server address"),
        ("http://me:s3cret@host/v1", "contains credentials"),
    ],
)
def test_what_is_no_address_is_refused_and_not_repeated(url: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem) as caught:
        usable_address(url, "a.source", TOKEN)
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    """A server that answers with the path that it is asked for, and no proxy set."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.path.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield listening
        listening.shutdown()
        thread.join()


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_a_proxy_of_the_environment_is_used(listening, monkeypatch, variable: str, scheme: str) -> None:
    if (variable, scheme) == ("all_proxy", ""):
        pytest.skip("ALL_PROXY without a scheme may be a SOCKS proxy")
    monkeypatch.setenv(variable, f"{scheme}127.0.0.1:{listening.server_port}")
    assert post("http://elsewhere.example/x") == b"http://elsewhere.example/x"


@pytest.mark.parametrize(
    "settings",
    [{"http_proxy": "http://127.0.0.1:1", "no_proxy": "127.0.0.1"}, {"all_proxy": "socks5://127.0.0.1:1"}],
)
def test_a_proxy_is_passed_by(listening, monkeypatch, settings: dict[str, str]) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert post(f"http://127.0.0.1:{listening.server_port}/x") == b"/x"


@pytest.mark.parametrize("trusted", [False, True])
def test_a_certificate_is_checked_against_the_systems(
    listening, tmp_path: Path, monkeypatch, waits: list[float], trusted: bool
) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path / "certificate.pem"
    pem, kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    authority = certificate.public_bytes(pem)
    file.write_bytes(key.private_bytes(pem, kind, serialization.NoEncryption()) + authority)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    listening.socket = context.wrap_socket(listening.socket, server_side=True)
    url = f"https://localhost:{listening.server_port}/x"
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
        assert post(url) == b"/x"
    else:
        assert "SSL_CERT_FILE" in failure(url).remedy
        assert waits == [], "a certificate does not become valid by waiting"
