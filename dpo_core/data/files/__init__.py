"""Rows out of files, and which files of a folder they are in."""
