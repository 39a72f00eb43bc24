"""What a Prefect server is asked to do: deployments, schedules, alerts, work pools."""
