"""Calls to MLflow that another process may have made before, and searches that answer in pages."""

from collections.abc import Callable
from typing import Any


def unless_there(create: Callable[[], object]) -> None:
    """Create something that another process may have created in the meantime."""
    from mlflow.exceptions import MlflowException

    try:
        create()
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def every(search: Callable[..., Any]) -> list[Any]:
    """All that a search of MLflow's finds; it answers in pages."""
    page = search()
    found = list(page)
    while page.token:
        page = search(page_token=page.token)
        found += page
    return found
