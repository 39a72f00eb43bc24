"""Processes around a run: supervision, the Prefect server, the environment."""
