"""Environment defaults for Prefect, MLflow and Great Expectations: no telemetry, few log lines, no secrets.

They must be set before these packages are imported.
"""

import logging
import os

from dpo_core.redaction import WithoutSecrets

_QUIET = {
    # Disable telemetry.
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "GX_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Prefect's log lines are not printed; its API and UI have all of them.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    # The temporary server of a local run starts slowly on a busy machine.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "TOKENIZERS_PARALLELISM": "true",
    # Waiting threads spin for some microseconds and then sleep. If they kept spinning, they would take cores
    # from other work and everything would be two to three times slower; sleeping at once costs 5 %.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "20000",
    # Wait up to eight minutes for a server that restarts: 2 + 4 + 8 + ... seconds.
    "PREFECT_CLIENT_MAX_RETRIES": "8",
    # dpo has its own progress bars.
    "TQDM_DISABLE": "1",
}


def keep_quiet() -> None:
    """Set the defaults that the user has not set, and PYTHONSAFEPATH for processes started with `python -m`.

    Without it Python imports from the current folder first, where a user's own package may be called flows,
    tasks or deploy.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    os.environ["PYTHONSAFEPATH"] = "1"


def hide_secrets_in_logs() -> None:
    """Add the redaction filter to all existing log handlers; Prefect stores tracebacks."""
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        if not any(isinstance(known, WithoutSecrets) for known in handler.filters):
            handler.addFilter(WithoutSecrets())
