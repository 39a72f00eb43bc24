"""Pairwise comparison of answers by a known reward, a reward model or a language model as judge."""
