"""From a model and token ids to log-probs: packs and padded rows, attention, the head, branches."""
