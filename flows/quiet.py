"""What Prefect, MLflow and Great Expectations are told by the environment; they read it when imported."""

import os

_QUIET = {
    # Nothing reports home.
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "GX_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Prefect's console lines stay out of the terminal; its API and UI keep them all.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    # The temporary server of a local run needs a while on a busy machine.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "TOKENIZERS_PARALLELISM": "true",
    # Threads that wait sleep. Spinning ones take the cores from whatever else computes on the machine: beside
    # other work everything goes two to three times slower.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Our own bars show what is worth waiting for.
    "TQDM_DISABLE": "1",
}


def keep_quiet() -> None:
    """Set them where the user has not."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
