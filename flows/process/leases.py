"""Let a run of a deployment outlive a Prefect server that restarts or is away for a while.

Prefect keeps the limit of a deployment by leases. The engine renews the lease of its run every 225 s, and
ends the run when that fails three times. A server that restarts has lost its leases unless it stores them;
one that is away renews none. Either would end a training that needs no server. Here a renewal that fails is
logged and the run goes on; its place in the limit stays taken until the run ends.
"""

import functools
import logging
from typing import Any
from uuid import UUID

log = logging.getLogger("dpo")

LEASE_SECONDS = 3600.0
"""How long each renewal lasts, so that the lease outlives a server that is away for less than that."""
_RENEWED = "_renewed_by_dpo"


def outlive_leases() -> None:
    """From now on no failed renewal of this run's own lease ends this process."""
    from prefect.client.orchestration import SyncPrefectClient

    plain = SyncPrefectClient.renew_concurrency_lease
    if hasattr(plain, _RENEWED):
        return
    told = set()

    @functools.wraps(plain)
    def renew(self: Any, lease_id: UUID, lease_duration: float) -> Any:
        if lease_id != _lease_of_run():
            return plain(self, lease_id, lease_duration)
        try:
            return plain(self, lease_id, LEASE_SECONDS)
        except Exception as error:
            if (kind := _kind(error)) not in told:
                told.add(kind)
                log.warning("%s; the run goes on, and keeps its place in the limit of its deployment", kind)
            return None

    setattr(renew, _RENEWED, True)
    SyncPrefectClient.renew_concurrency_lease = renew  # type: ignore[method-assign]


def _lease_of_run() -> UUID | None:
    """The lease of the flow run that this thread works for."""
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    state = context.flow_run.state if context and context.flow_run else None
    return state.state_details.deployment_concurrency_lease_id if state else None


def _kind(error: Exception) -> str:
    if getattr(getattr(error, "response", None), "status_code", None) == 410:
        return (
            "Prefect's server has lost the lease of this run: it was restarted, and keeps leases in memory "
            "unless PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE names another place"
        )
    return f"Prefect's server could not be asked to renew the lease of this run ({type(error).__name__})"
