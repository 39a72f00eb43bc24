"""The ways to train: a file for each method, with its settings; `trainers` and `estimates` have the rest."""
