"""The training methods: a module for each, with its settings. The code is in `trainers` and `estimates`."""
