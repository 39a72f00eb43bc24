"""A lease that is not renewed ends no run, and a run's end has words."""

import threading
from asyncio import CancelledError
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import uuid4

import pytest


@pytest.fixture
def restarted() -> Iterator[str]:
    """The address of a server that has no lease any more."""

    class Gone(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # asked for a token against forged requests: there are none here
            self._answer(404)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(410)

        def _answer(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Gone)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/api"
    server.shutdown()
    server.server_close()


def test_a_lost_lease_of_the_run_ends_nothing(restarted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, StateDetails
    from prefect.context import FlowRunContext
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.states import Running

    import flows.deployed  # noqa: F401  (a worker imports it before the engine asks for the first time)

    lease = uuid4()
    state = Running(state_details=StateDetails(deployment_concurrency_lease_id=lease))
    client = SyncPrefectClient(restarted)
    told: list[str] = []
    monkeypatch.setattr("flows.process.leases.log.warning", lambda text, *values: told.append(text % values))
    with FlowRunContext.model_construct(flow_run=FlowRun(flow_id=uuid4(), state=state)):
        for _ in range(2):
            assert client.renew_concurrency_lease(lease, 300) is None
        with pytest.raises(PrefectHTTPStatusError):
            client.renew_concurrency_lease(uuid4(), 300)
    with pytest.raises(PrefectHTTPStatusError):
        client.renew_concurrency_lease(lease, 300)
    (line,) = told
    assert "in a restart" in line
    assert "the run continues" in line


@pytest.mark.parametrize("error", [CancelledError(), ValueError(), RuntimeError("  ")])
def test_an_end_without_a_message_is_told_in_words(error: BaseException) -> None:
    from flows.run_lifecycle import reason_of

    words = reason_of(error)
    assert type(error).__name__ in words
    assert len(words.split()) > 4
