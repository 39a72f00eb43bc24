"""Estimates with intervals, tests, and measures of texts."""
