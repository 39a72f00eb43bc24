"""Reads rows from files, folders and hub data sets."""
