"""Evaluation of any Hugging Face checkpoint on named suites: preferences, capabilities, harm.

`suites` lists them; `results` is what each leaves; `model_under_test` is the model that is asked.
"""
