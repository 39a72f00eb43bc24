"""Sampling from a model: rows that grow by a token, from a cache where that is exact."""
