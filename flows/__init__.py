"""Composition only: the alignment flow, its recipes and the command line."""
