"""Connects commands to the configured Prefect server, and turns its errors into user errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL

from dpo_core.errors import RecipeError, StageFailed
from flows.process.temporary_server import is_temporary

_REMEDY = "Start one with: prefect server start; then: export PREFECT_API_URL=http://127.0.0.1:4200/api"


def server_address() -> str | None:
    """The configured server's address; None if neither environment nor profile has one."""
    address: str | None = PREFECT_API_URL.value()
    return None if is_temporary(address) else address


def refused(error: Any) -> RecipeError:
    """The user error for an HTTP error of the server."""
    address, status = server_address(), error.response.status_code
    if status == 401:
        return RecipeError(
            f"the Prefect server at {address} requires a valid user name and password",
            "Set PREFECT_API_AUTH_STRING to NAME:PASSWORD, as in the server's PREFECT_SERVER_API_AUTH_STRING",
        )
    answer = " ".join(error.response.text.split())[:500]
    return RecipeError(
        f"the Prefect server at {address} refused the request ({status}: {answer})", "See the server's log"
    )


@contextmanager
def server() -> Iterator[Any]:
    """A client of the configured server. No temporary server is started, because it would lose the changes.

    Raises:
        RecipeError: no server is configured, it does not answer, or it refuses the request.
    """
    address = server_address()
    if address is None:
        raise RecipeError("no Prefect server is configured, and schedules need one", _REMEDY)
    try:
        with get_client(sync_client=True) as client:
            yield client
    except PrefectHTTPStatusError as error:
        raise refused(error) from error
    except (httpx.TransportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "Failed to reach API" not in str(error):
            raise
        raise RecipeError(f"the Prefect server at {address} does not answer", _REMEDY) from error


def unreachable_error(error: Exception, begun: bool) -> Exception:
    """The user error if Prefect's API cannot be reached; other errors are returned unchanged.

    At the start Prefect raises a plain RuntimeError; later, after its retries, the connection error.

    Args:
        begun: whether the run has a record and can be resumed.
    """
    where = server_address()
    if isinstance(error, PrefectHTTPStatusError):
        return refused(error) if error.response.status_code == 401 else error
    away = isinstance(error, httpx.TransportError)
    if away and begun:
        return StageFailed(
            f"the Prefect API at {where or 'the temporary server of the run'} became unreachable during the "
            f"run ({type(error).__name__}); finished stages are kept",
            "Start it again, or unset PREFECT_API_URL, then resume the run",
        )
    if not away and "Failed to reach API" not in str(error):
        return error
    if where is None:
        return RecipeError(
            f"Prefect's temporary server did not start ({error})", "Run again, or set PREFECT_API_URL"
        )
    return RecipeError(
        f"the Prefect API at {where} does not answer",
        "Start it with: prefect server start; or unset PREFECT_API_URL to use a temporary server",
    )
