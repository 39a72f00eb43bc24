"""Promotion: which version of a registered model is the champion, and how the champion is replaced."""
