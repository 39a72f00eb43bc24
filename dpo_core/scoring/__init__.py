"""Computes log-probs of token ids: packs and padded rows, their attention, the output head, FLOPs."""
