"""What Prefect, MLflow and Great Expectations may say; their settings are read when they are imported."""

import logging
import os

from dpo_core.redaction import WithoutSecrets

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
    # Threads that wait spin for some microseconds and then sleep. Spinning on, they take the cores from what
    # else computes on the machine, and all goes two to three times slower; sleeping at once costs 5 %.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "20000",
    # A server that is started again within eight minutes is waited for: 2 + 4 + 8 + ... seconds.
    "PREFECT_CLIENT_MAX_RETRIES": "8",
    # Our own bars show what is worth waiting for.
    "TQDM_DISABLE": "1",
}


def keep_quiet() -> None:
    """Set them where the user has not; and PYTHONSAFEPATH for whatever is started from here with `python -m`.

    Without it Python looks in the current folder first, where a user's own package may be called flows,
    tasks or deploy.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    os.environ["PYTHONSAFEPATH"] = "1"


def hide_secrets_in_logs() -> None:
    """Let every handler that is set up by now show and send no secret: Prefect keeps tracebacks."""
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        if not any(isinstance(known, WithoutSecrets) for known in handler.filters):
            handler.addFilter(WithoutSecrets())
