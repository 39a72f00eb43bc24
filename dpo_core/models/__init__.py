"""Locates, checks, builds, loads and saves models and tokenizers."""
