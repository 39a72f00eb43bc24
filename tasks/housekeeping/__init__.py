"""Maintenance of a workspace: health checks, garbage collection, and reference log-prob caches."""
