"""Tokenisation: chat templates, the tokens that carry loss, and truncation of conversations."""
