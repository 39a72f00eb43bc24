"""Access control of `dpo ui`: this machine only, or a password."""

import importlib.util
import ipaddress
import os
import secrets
from base64 import b64encode
from dataclasses import dataclass, field
from pathlib import Path

from dpo_core.errors import RecipeError
from dpo_core.system import write_atomic

USER, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
"""The variables that MLflow's clients read."""
_SHORTEST = 12  # MLflow's minimum length of a password
_CONFIG = """[mlflow]
database_uri = sqlite:///{users}
default_permission = READ
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


@dataclass(frozen=True)
class Access:
    """Options and environment of MLflow's server, and the headers of requests to it."""

    options: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


def access(host: str, workspace: Path) -> Access:
    """No login on a loopback address; on any other one MLflow requires a name and a password.

    MLflow stores users, with hashed passwords, in the workspace.

    Raises:
        RecipeError: no password is set, or the package for logins is not installed.
    """
    if is_loopback(host):
        return Access()
    name, password = os.environ.get(USER, ""), os.environ.get(PASSWORD, "")
    if not name or len(password) < _SHORTEST:
        raise RecipeError(
            f"--host {host} would let the network read and change the workspace without a password",
            f"Set {USER} and {PASSWORD} ({_SHORTEST} characters or more), which MLflow then requires; or "
            "leave out --host, and connect through: ssh -L 5000:127.0.0.1:5000 THIS_MACHINE",
        )
    if importlib.util.find_spec("flask_wtf") is None:
        raise RecipeError(
            "MLflow cannot require a password: Flask-WTF is not installed",
            "Run: pip install 'dpo-pipeline[auth]'",
        )
    users, config = workspace / "mlflow-users.db", workspace / "mlflow-auth.ini"
    users.touch(mode=0o600)
    if "\n" in str(users):
        raise RecipeError(
            f"the path of the workspace, {workspace!r}, contains a line break", "Choose another workspace"
        )
    # MLflow interpolates %(name)s in this file, so escape %.
    write_atomic(config, _CONFIG.format(users=str(users).replace("%", "%%")))
    return Access(
        options=["--app-name", "basic-auth"],
        environment={
            "MLFLOW_AUTH_CONFIG_PATH": str(config),
            "MLFLOW_AUTH_ADMIN_USERNAME": name,
            "MLFLOW_AUTH_ADMIN_PASSWORD": password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
        },
        headers={"Authorization": f"Basic {b64encode(f'{name}:{password}'.encode()).decode()}"},
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
