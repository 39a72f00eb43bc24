"""Stores a run's resolved recipe, checks a resume against it, and gives the command that reproduces the run.

Without the check, a resume with other settings would be recorded under the settings of the first start.
"""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dpo_core.config import Config
from dpo_core.errors import RecipeError
from dpo_core.system import digest_file, write_atomic
from tasks.recipe.policies import is_external
from tasks.recipe.read import load_recipe
from tasks.recipe.recipe import Recipe
from tasks.runs.record import RunRecord, list_runs
from tasks.store.files import disk_errors, run_folder
from tasks.tracking.mlflow_run import flatten

FILE = "recipe.yaml"
# No computed number depends on these settings.
_MAY_DIFFER = frozenset({"workspace", "tracking", "description"})
_SHOWN = 6
# Options of `dpo launch` that choose where jobs run, each with a value.
_WHERE = ("--on", "--settings", "--with")
Part = TypeVar("Part", bound=Config)


def recipe_path(workspace: str | Path, run_id: str) -> Path:
    """Path of a run's resolved recipe."""
    return run_folder(workspace, run_id).absolute() / FILE


def model_names(recipe: Recipe) -> list[str]:
    """The names of all models from outside the recipe: the base model, starts and references."""
    named = [model for policy in recipe.policies.values() for model in policy.models if is_external(model)]
    return list(dict.fromkeys([recipe.model.name, *named]))


def with_models(recipe: Recipe, names: Mapping[str, str]) -> Recipe:
    """The recipe with model names replaced as in `names`; see `RunRecord.models`."""
    if not names:
        return recipe

    def renamed(part: Part, *fields: str) -> Part:
        own = {field: getattr(part, field) for field in fields}
        return part.model_copy(update={field: names.get(name, name) for field, name in own.items()})

    policies = {name: renamed(policy, "start", "reference") for name, policy in recipe.policies.items()}
    return recipe.model_copy(update={"model": renamed(recipe.model, "name"), "policies": policies})


def store_recipe(workspace: Path, record: RunRecord, recipe: Recipe) -> RunRecord:
    """Write the resolved recipe into the run's folder; returns the record with its digest."""
    path = recipe_path(workspace, record.run_id)
    # Absolute, so that the file finds its workspace from every folder.
    facts = recipe.model_dump(mode="json") | {"workspace": str(workspace.absolute())}
    about = (
        f"# The resolved recipe of the run {record.run_id}, every default written out.\n"
        f"# Relative paths in it begin at {json.dumps(str(Path.cwd()))}.\n"
    )
    with disk_errors(workspace, "writing the recipe of the run"):
        write_atomic(path, about + yaml.safe_dump(facts, sort_keys=False, allow_unicode=True))
    return record.model_copy(update={"recipe_sha256": digest_file(path)})


def require_same_recipe(workspace: Path, record: RunRecord, recipe: Recipe) -> None:
    """Refuse to resume a run with other settings than it was started with.

    Runs of older versions stored no recipe and are not checked.

    Raises:
        RecipeError: a setting differs, or the stored recipe is missing or damaged.
    """
    if record.recipe_sha256 is None:
        return
    path = recipe_path(workspace, record.run_id)
    remedy = "start a new run without --resume: finished stages are not run again"
    if not path.is_file() or digest_file(path) != record.recipe_sha256:
        raise RecipeError(
            f"the stored recipe of the run {record.run_id}, {path}, is missing or was changed, so the "
            "present settings cannot be compared with it",
            remedy.capitalize(),
        )
    stored, current = _settings(load_recipe(str(path))), _settings(recipe)
    names = _differing(stored, current)
    if not names:
        return
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    shown = names[:_SHOWN]
    raise RecipeError(
        f"the run {record.run_id} was started with {_listed(stored, shown)}{more}; this recipe has "
        f"{_listed(current, shown)}{more}",
        f"Resume with the stored recipe: {_run_again(record.command, path)} --resume {record.run_id}; "
        f"or {remedy}",
    )


def differing_settings(workspace: Path, a: str, b: str) -> list[str] | None:
    """The settings of two runs that differ, each as `seed: 0 -> 1`.

    Args:
        a, b: models as in `dpo compare`, each of a run: RUN, RUN:POLICY, runs:/RUN or runs:/RUN/POLICY.

    Returns:
        None if one of them is not of a run of this workspace that stored its recipe.

    Raises:
        RecipeError: a stored recipe is damaged.
    """
    names = [re.split("[:/]", model.removeprefix("runs:/"))[0] for model in (a, b)]
    paths = [workspace / "runs" / name / FILE for name in names]
    if not all(name and path.is_file() for name, path in zip(names, paths, strict=True)):
        return None
    first, second = (_settings(load_recipe(str(path))) for path in paths)
    return _changes(first, second)


def changed_since(workspace: str | Path, recipe: Recipe) -> tuple[str, list[str]] | None:
    """The newest finished run of a recipe's name, and the settings that differ from it.

    Returns:
        The run's name, and each setting as `seed: 0 -> 1`, a policy that one of them lacks as
        `policies.PPO: new` or `removed`; None if there is no such run.
    """
    for record in list_runs(workspace):
        path = Path(workspace) / "runs" / record.run_id / FILE
        if record.status != "done" or record.recipe != recipe.name or not path.is_file():
            continue
        try:
            earlier = load_recipe(str(path))
        except RecipeError:  # damaged, or of an older version
            continue
        now = with_models(recipe, record.models)
        added = [f"policies.{name}: new" for name in now.policies if name not in earlier.policies]
        removed = [f"policies.{name}: removed" for name in earlier.policies if name not in now.policies]
        both = now.policies.keys() & earlier.policies.keys()
        first, second = (
            _settings(r.model_copy(update={"policies": {n: p for n, p in r.policies.items() if n in both}}))
            for r in (earlier, now)
        )
        return record.run_id, [*added, *removed, *_changes(first, second)]
    return None


def _changes(a: dict[str, str], b: dict[str, str]) -> list[str]:
    return [f"{name}: {a.get(name, 'not set')} -> {b.get(name, 'not set')}" for name in _differing(a, b)]


def reproducing_command(command: str, workspace: str | Path, run_id: str) -> str:
    """The command that repeats a run from its stored recipe, even if the original file has changed."""
    return _run_again(command, recipe_path(workspace, run_id))


def _run_again(command: str, path: Path) -> str:
    words = shlex.split(command)
    if words[:2] != ["dpo", "launch"]:
        return shlex.join(["dpo", "run", str(path)])
    kept = []
    for place, word in enumerate(words):
        if word.partition("=")[0] in _WHERE:
            kept += [word] if "=" in word else words[place : place + 2]
    return shlex.join(["dpo", "launch", str(path), *kept])


def _settings(recipe: Recipe) -> dict[str, str]:
    """Every setting that affects results: dotted name to its JSON text."""
    facts: dict[str, Any] = recipe.model_dump(mode="json", exclude=set(_MAY_DIFFER))
    return {name: json.dumps(value, ensure_ascii=False) for name, value in flatten(facts).items()}


def _differing(a: dict[str, str], b: dict[str, str]) -> list[str]:
    return [name for name in {**a, **b} if a.get(name) != b.get(name)]


def _listed(settings: dict[str, str], names: list[str]) -> str:
    return ", ".join(
        f"{name}={settings[name].strip(chr(34))}" if name in settings else f"no {name}" for name in names
    )
