"""Keeps a deployment's run alive if the Prefect server restarts or is unreachable for a while.

Prefect enforces a deployment's concurrency limit by leases. The engine renews its run's lease every 225 s and
ends the run if that fails three times. A server that restarts loses its leases unless it stores them, and one
that is unreachable renews none; either would end a training that needs no server. Here a failed renewal is
logged and the run continues; it counts towards the limit until it ends.
"""

import functools
import logging
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.context import FlowRunContext

log = logging.getLogger("dpo")

LEASE_SECONDS = 3600.0
"""Duration of each renewal, so that the lease outlives shorter outages of the server."""
_RENEWED = "_renewed_by_dpo"


def outlive_leases() -> None:
    """From now on, failed renewals of this run's own lease do not end this process."""
    plain = SyncPrefectClient.renew_concurrency_lease
    if hasattr(plain, _RENEWED):
        return
    logged = set()

    @functools.wraps(plain)
    def renew(self: Any, lease_id: UUID, lease_duration: float) -> Any:
        if lease_id != _lease_of_run():
            return plain(self, lease_id, lease_duration)
        try:
            return plain(self, lease_id, LEASE_SECONDS)
        except Exception as error:
            if (kind := _kind(error)) not in logged:
                logged.add(kind)
                log.warning("%s; the run continues and still counts towards its deployment's limit", kind)
            return None

    setattr(renew, _RENEWED, True)
    SyncPrefectClient.renew_concurrency_lease = renew  # type: ignore[method-assign]


def _lease_of_run() -> UUID | None:
    """The lease of the flow run that this thread works for."""
    context = FlowRunContext.get()
    state = context.flow_run.state if context and context.flow_run else None
    return state.state_details.deployment_concurrency_lease_id if state else None


def _kind(error: Exception) -> str:
    if getattr(getattr(error, "response", None), "status_code", None) == 410:
        return (
            "Prefect's server lost the lease of this run in a restart, because it keeps leases in memory "
            "(see PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE)"
        )
    return f"Prefect's server did not renew the lease of this run ({type(error).__name__})"
