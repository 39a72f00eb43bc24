"""Prefect server plug-in that shortens the wait for out-of-order events from 15 minutes to 30 seconds.

    PREFECT_SERVER_EVENTS_CAUSAL_ORDERING=tasks.scheduling.event_order prefect server start

Automations receive events in order. If a state follows another within five minutes, the server holds back its
event until it has seen the event of the other state, for at most 15 minutes. It never sees some of them:
those of runs that a schedule created, and those from before a restart. Without this plug-in, alerts about
late and crashed runs are delayed by that time.
"""

from datetime import timedelta

from prefect.server.events.ordering import memory

memory.PRECEDING_EVENT_LOOKBACK = timedelta(seconds=30)
CausalOrdering = memory.CausalOrdering
