"""Helpers for MLflow's client: create what may already exist, and read all pages of a search."""

from collections.abc import Callable
from typing import Any

from mlflow.exceptions import MlflowException


def create_if_missing(create: Callable[[], object]) -> None:
    """Call `create`; ignore MLflow's error if the object exists already."""
    try:
        create()
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def all_pages(search: Callable[..., Any]) -> list[Any]:
    """The results of all pages of an MLflow search."""
    page = search()
    results = list(page)
    while page.token:
        page = search(page_token=page.token)
        results += page
    return results
