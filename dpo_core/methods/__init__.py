"""The ways to train: a file for each method, with its settings and its trainer."""
