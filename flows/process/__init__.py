"""Around a run: the Prefect server, its leases, the environment."""
