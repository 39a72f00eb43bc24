"""Reads the settings of a cluster, from the options of a command or the parameters of a deployment."""

from pathlib import Path

import yaml

from deploy.launchers.registry import TARGETS, Cluster
from dpo_core.errors import RecipeError
from dpo_core.system import read_small
from dpo_core.yaml import read_yaml
from tasks.recipe.read import with_overrides


def read_cluster(on: str, path: str | None, overrides: list[str]) -> Cluster | None:
    """The cluster with its settings; None for this machine.

    Raises:
        RecipeError: there is no such cluster, or its settings are not valid.
    """
    if on == "local":
        if path or overrides:
            raise RecipeError("local has no cluster settings", "Leave out --settings and --with")
        return None
    if on not in TARGETS:
        raise RecipeError(f"there is no launcher '{on}'", f"Choose one of: {', '.join(['local', *TARGETS])}")
    try:
        raw = read_yaml(read_small(Path(path))) if path else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} cannot be read ({error})", "Name a YAML file of settings") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} is not a mapping of settings", "Write lines such as: nodes: 2")
    kind, _ = TARGETS[on]
    raw = {name: value for name, value in raw.items() if value is not None}  # empty fields of the template
    remedy = f"Set it in the --settings file or with --with NAME=VALUE; all settings: dpo config cluster {on}"
    config = with_overrides(kind, raw, overrides, f"the settings for {on} are not valid", remedy)
    return Cluster(on=on, settings=config)
