"""The record of each run of a workspace."""
