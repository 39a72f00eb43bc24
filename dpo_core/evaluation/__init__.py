"""Evaluation of any Hugging Face checkpoint on named suites: preferences, capabilities, harm.

`suites` lists them; `results` is what each leaves; `subject` is the model that is asked.
"""
