"""Evaluates Hugging Face checkpoints on named suites: preferences, capabilities, safety.

`suites` defines them, `results` holds their results, `model_under_test` is the model that is evaluated.
"""
