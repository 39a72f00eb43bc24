"""Configures a Prefect server: deployments, schedules, triggers, alerts and work pools."""
