"""Sampling from a model, with its key-value cache if that is exact."""
