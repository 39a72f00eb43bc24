"""Who may look into a workspace through `dpo ui`: this machine, or whoever knows the password."""

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
"""What MLflow's own clients read too."""
_SHORTEST = 12  # MLflow's rule
_CONFIG = """[mlflow]
database_uri = sqlite:///{users}
default_permission = READ
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""


@dataclass(frozen=True)
class Access:
    """What MLflow's server is started with, and what asks it for something."""

    options: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


def access(host: str, workspace: Path) -> Access:
    """Nothing on a loopback address; on any other one MLflow asks for a name and a password.

    MLflow keeps them, hashed, in the workspace, with those of the users that this one adds.

    Raises:
        RecipeError: there is no password, or what MLflow needs to ask for one is not installed.
    """
    if is_loopback(host):
        return Access()
    name, password = os.environ.get(USER, ""), os.environ.get(PASSWORD, "")
    if not name or len(password) < _SHORTEST:
        raise RecipeError(
            f"--host {host} would let the network read and change the workspace without a password",
            f"Set {USER} and {PASSWORD} ({_SHORTEST} characters or more), which MLflow then asks for; or "
            "leave --host out, and come through: ssh -L 5000:127.0.0.1:5000 THIS_MACHINE",
        )
    if importlib.util.find_spec("flask_wtf") is None:
        raise RecipeError(
            "MLflow cannot ask for a password: Flask-WTF is not installed",
            "Run: pip install 'dpo-pipeline[auth]'",
        )
    users, config = workspace / "mlflow-users.db", workspace / "mlflow-auth.ini"
    users.touch(mode=0o600)
    if "\n" in str(users):
        raise RecipeError(f"the path of the workspace, {workspace!r}, has a line break", "Name another one")
    # MLflow reads %(name)s in it as what stands under that name.
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
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
