"""Estimates of the tokens, operations and memory of a training before it runs."""
