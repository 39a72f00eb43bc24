"""Prompts and demonstrations that the package makes itself, for runs without any data."""
