"""For Prefect's server: let an event wait half a minute, not a quarter of an hour, for the one it follows.

    PREFECT_SERVER_EVENTS_CAUSAL_ORDERING=tasks.scheduling.event_order prefect server start

Automations see events in their order. Where a state follows another within five minutes, the server holds its
event back until it has seen that of the other, 15 minutes at most. Some it never sees: those of runs that a
schedule plans, and what came before a restart. Alerts of late and crashed runs would come that much later.
"""

from datetime import timedelta

from prefect.server.events.ordering import memory

memory.PRECEDING_EVENT_LOOKBACK = timedelta(seconds=30)
CausalOrdering = memory.CausalOrdering
