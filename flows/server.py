"""The Prefect server that a command speaks to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dpo_core.errors import RecipeError

_REMEDY = "Start one with: prefect server start; then: export PREFECT_API_URL=http://127.0.0.1:4200/api"


def server_address() -> str | None:
    """Where the server is; none where the environment and the profile name none."""
    from prefect.settings import PREFECT_API_URL

    address: str | None = PREFECT_API_URL.value()
    return address


def refused(error: Any) -> RecipeError:
    """What to tell a person of an answer that Prefect's client takes for an error."""
    address, status = server_address(), error.response.status_code
    if status == 401:
        return RecipeError(
            f"the Prefect server at {address} asks for a password, or for another one",
            "Set PREFECT_API_AUTH_STRING to NAME:PASSWORD, as the server has it in "
            "PREFECT_SERVER_API_AUTH_STRING",
        )
    said = " ".join(error.response.text.split())[:500]
    return RecipeError(
        f"the Prefect server at {address} refused ({status}: {said})", "See what its log says about it"
    )


@contextmanager
def server() -> Iterator[Any]:
    """A client of the server. A temporary one would forget what it is told, so none is started.

    Raises:
        RecipeError: no server is named, it does not answer, or it refuses what it was sent.
    """
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    address = server_address()
    if address is None:
        raise RecipeError("no Prefect server is named, and schedules live on one", _REMEDY)
    try:
        with get_client(sync_client=True) as client:
            yield client
    except PrefectHTTPStatusError as error:
        raise refused(error) from error
    except (httpx.TransportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "Failed to reach API" not in str(error):
            raise
        raise RecipeError(f"the Prefect server at {address} does not answer", _REMEDY) from error
