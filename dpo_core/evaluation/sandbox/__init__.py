"""Runs code that a model wrote in a sandbox of Linux namespaces."""
