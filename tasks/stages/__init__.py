"""The stages of a run, and the frame that runs each of them."""
