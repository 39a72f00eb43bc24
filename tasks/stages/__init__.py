"""The stages of a run, and the frame that each of them has."""
