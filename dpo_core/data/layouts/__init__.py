"""Adapters from the row layouts of common files and public data sets to canonical records."""
