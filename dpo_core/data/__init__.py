"""Preference data: files of any usual format become one canonical table of rows, split by prompt."""
