"""The science of preference alignment in plain PyTorch: data, log-probs, objectives, training, evaluation.

Nothing here knows of Prefect, MLflow or Great Expectations; every module can be used from a script.
"""
