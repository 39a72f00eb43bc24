"""Upkeep of a workspace: the doctor, garbage collection, caches of reference log-probs."""
