"""Evaluation suites: preferences, capabilities, harm. A new one is a module with `SUITES`."""
