"""Launchers of jobs on this machine and on clusters, the Prefect deployments, and the images."""
