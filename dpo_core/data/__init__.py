"""Preference data: converts files of common formats to one canonical table of rows, split by prompt."""
