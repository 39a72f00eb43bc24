"""The Prefect server that a command speaks to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dpo_core.errors import RecipeError, StageFailed

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


def prefect_away(error: Exception, begun: bool) -> Exception:
    """What to say where Prefect's API cannot be reached; other errors stay what they are.

    At the start Prefect says so in a bare RuntimeError; later, when its patience is over, the error of the
    connection comes through.

    Args:
        begun: whether the run is on record, and can be resumed.
    """
    import httpx
    from prefect.exceptions import PrefectHTTPStatusError

    where = server_address()
    if isinstance(error, PrefectHTTPStatusError):
        return refused(error) if error.response.status_code == 401 else error
    away = isinstance(error, httpx.TransportError)
    if away and begun:
        return StageFailed(
            f"the Prefect API at {where or 'the temporary server of the run'} went away in the middle of the "
            f"run ({type(error).__name__}); finished stages are kept",
            "Start it again, or unset PREFECT_API_URL, then resume the run",
        )
    if not away and not any(said in str(error) for said in ("Failed to reach API", "ephemeral Prefect API")):
        return error
    if where is None:
        return RecipeError(
            f"Prefect's own server did not start ({error})", "Run again, or set PREFECT_API_URL"
        )
    return RecipeError(
        f"the Prefect API at {where} does not answer",
        "Start it with: prefect server start; or unset PREFECT_API_URL, and the run starts one of its own",
    )
