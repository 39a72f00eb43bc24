"""The alignment flow, its recipes, the command line, and the processes around a run."""
