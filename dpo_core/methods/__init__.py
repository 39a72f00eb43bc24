"""The ways to train: a file for each method, with its settings and its estimate; `trainers` has the rest."""
