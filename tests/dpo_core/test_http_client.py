"""The HTTP client: proxies, certificates, and how long a server asks to wait."""

import datetime
import ssl
import threading
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from dpo_core.errors import StageFailed
from dpo_core.http_client import Answer, JsonServer


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch):
    """A server that answers with the path that it is asked for."""
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

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(url: str) -> Answer:
    with JsonServer("the server", url, timeout=5, secret="") as server:
        return server.post({}, lambda failed, attempts: None)


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_a_proxy_of_the_environment_is_used(listening, monkeypatch, variable: str) -> None:
    monkeypatch.setenv(variable, f"http://127.0.0.1:{listening.server_port}")
    assert ask("http://elsewhere.example/x").content == b"http://elsewhere.example/x"


def test_a_proxy_needs_no_scheme(listening, monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", f"127.0.0.1:{listening.server_port}")
    assert ask("http://elsewhere.example/x").content == b"http://elsewhere.example/x"


@pytest.mark.parametrize(
    "settings",
    [{"http_proxy": "http://127.0.0.1:1", "no_proxy": "127.0.0.1"}, {"all_proxy": "socks5://127.0.0.1:1"}],
)
def test_a_proxy_is_passed_by(listening, monkeypatch, settings: dict[str, str]) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert ask(f"http://127.0.0.1:{listening.server_port}/x").content == b"/x"


@pytest.mark.parametrize("trusted", [False, True])
def test_a_certificate_is_checked_against_the_systems(
    listening, tmp_path: Path, monkeypatch, trusted: bool
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
        assert ask(url).content == b"/x"
    else:
        with pytest.raises(StageFailed, match="the certificate of the server is not trusted") as caught:
            ask(url)
        assert "SSL_CERT_FILE" in caught.value.remedy


@pytest.mark.parametrize(("status", "problem"), [(403, "answered 403"), (200, "could not be reached")])
def test_a_refusal_whose_text_is_cut_off_is_a_refusal(listening, status: int, problem: str) -> None:
    def cut(handler: BaseHTTPRequestHandler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.send_response(status)
        handler.send_header("Content-Length", "99")
        handler.end_headers()
        handler.wfile.write(b"not allo")

    listening.RequestHandlerClass.do_POST = cut
    assert ask(f"http://127.0.0.1:{listening.server_port}/x").problem == problem


def test_a_server_may_say_in_several_ways_how_long_to_wait() -> None:
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=60)
    said = [
        ({}, 0),
        ({"retry-after": "2.5"}, 2.5),
        ({"retry-after": "2", "retry-after-ms": "300"}, 0.3),
        ({"retry-after": format_datetime(later)}, 60),
        ({"retry-after": "-1"}, 0),
        ({"retry-after": "nan"}, 0),
        ({"retry-after": "soon"}, 0),
    ]
    for headers, seconds in said:
        assert Answer("answered 503", headers=headers).retry_after == pytest.approx(
            seconds, abs=5e-3 + seconds / 20
        )
