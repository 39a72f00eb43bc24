"""Read a recipe from a shipped or own YAML file, apply overrides, and report every fault with its field."""

import difflib
import itertools
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from yaml.constructor import ConstructorError

from dpo_core.errors import RecipeError
from dpo_core.objectives import get, names
from dpo_core.redaction import find_secret
from dpo_core.system import read_small
from dpo_core.yaml import read_yaml
from tasks.recipe.policies import CLASSES
from tasks.recipe.recipe import Recipe

Model = TypeVar("Model", bound=BaseModel)


def shipped_recipes() -> dict[str, Path]:
    """The shipped recipes, by name."""
    folder = Path(str(resources.files("flows"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_mapping(path: Path, name: str, unreadable: str, example: str) -> dict[str, Any]:
    """The fields of a YAML file.

    Args:
        name: of the file, in errors.
        unreadable: the remedy where it cannot be read.
        example: the remedy where it holds no fields.

    Raises:
        RecipeError: it cannot be read, is not valid YAML, or is not a mapping.
    """
    try:
        raw = read_yaml(read_small(path))
    except OSError as error:
        raise RecipeError(f"{name} cannot be read ({error.strerror})", unreadable) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise RecipeError(f"{name} is not valid YAML: {where}", "Correct that line") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{name} is not a mapping of fields", example)
    return raw


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe or a YAML file and apply overrides of the form `a.b=value`.

    Raises:
        RecipeError: unknown recipe, unreadable or malformed YAML, unknown field, value out of range.
    """
    path = _find(name)
    raw = read_mapping(path, f"the recipe {path}", "Check its path", "Start from a shipped recipe")
    return with_overrides(Recipe, raw, overrides, f"the recipe {name} cannot be used", _KNOWN_FIELDS)


_KNOWN_FIELDS = "See every field and its range with: dpo config schema"


def _find(name: str) -> Path:
    recipes = shipped_recipes()
    if name in recipes:
        return recipes[name]
    path = Path(name).expanduser()
    if path.is_dir():
        raise RecipeError(f"{path} is a folder, not a recipe", "Name the YAML file")
    if not path.exists():
        near = difflib.get_close_matches(name, recipes, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise RecipeError(
            f"there is no recipe named {name}{hint} and no such file",
            f"Shipped recipes: {', '.join(recipes)}; or name a YAML file",
        )
    return path


def with_overrides(
    model: type[Model], raw: dict[str, Any], overrides: Sequence[str], unusable: str, remedy: str
) -> Model:
    """Validate settings after applying overrides of the form `a.b=value`.

    Args:
        unusable: beginning of the error messages.
        remedy: remedy of validation errors.

    Raises:
        RecipeError: an override of another form, an unknown field, a value out of range.
    """
    for override in overrides:
        _apply_override(raw, override)
    try:
        settings = model.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{unusable}: {_describe_faults(error, model)}", remedy) from error
    except RecipeError as error:  # raised by a validator, with its own remedy
        raise RecipeError(f"{unusable}: {error.problem}", error.remedy) from error
    if place := find_secret(raw):
        # It would appear in MLflow, Prefect, manifests and pages.
        raise RecipeError(
            f"{unusable}: {place} holds a secret, which every record would show", _REMOVE_SECRET
        )
    return settings


_REMOVE_SECRET = (
    "Remove it; secrets are read from the environment alone: HF_TOKEN, DPO_REWARD_TOKEN, DPO_JUDGE_KEY, "
    "MLFLOW_TRACKING_USERNAME with MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_URI for a database's address"
)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """Apply one override `a.b=value` to a mapping; the value is YAML. `policies.NAME=null` removes a policy.

    Raises:
        RecipeError: the override is not of that form.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(
            f"--set {override} is not of the form a.b=value", "Write for example policies.DPO.epochs=2"
        )
    try:
        value = read_yaml(text) if text else None
    except yaml.YAMLError as error:
        problem = f"--set {_short(override)}: the value is not valid YAML{_why(error)}"
        raise RecipeError(
            problem, "Correct the value, or put it in quotes within the argument to make it a text"
        ) from error
    if isinstance(value, str):
        value = _number(value)
    place = raw
    for part, field in itertools.pairwise(parts):
        inner = place.setdefault(part, {})
        if not isinstance(inner, dict):
            raise RecipeError(
                f"--set {override}: {part} is a single value and has no field {field}", _KNOWN_FIELDS
            )
        place[part] = inner = dict(inner)  # a copy, because YAML aliases may share it
        place = inner
    if value is None and parts[:-1] == ["policies"]:
        if parts[-1] not in place:
            raise RecipeError(f"--set {override}: there is no policy '{parts[-1]}'", _KNOWN_FIELDS)
        del place[parts[-1]]
    else:
        place[parts[-1]] = value


def _why(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None)
    return f": {problem}" if isinstance(error, ConstructorError) and problem else ""


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]} …"


def _number(text: str) -> str | float:
    """YAML 1.1 reads 1e-5 as a string; people mean a number."""
    try:
        return float(text) if text[:1] in "0123456789.-+" else text
    except ValueError:
        return text


def _describe_faults(error: ValidationError, root: type[BaseModel]) -> str:
    """Every fault with its field, in one line; `root` is the model that was validated."""
    faults = []
    for fault in error.errors():
        place = fault["loc"]
        if place[-1:] == ("[key]",):
            faults.append(f"{'.'.join(map(str, place[:-1]))}: names are texts; write {place[-2]!r} in quotes")
            continue
        owner = root
        if root is Recipe and place[:1] == ("policies",) and len(place) > 2:
            owner = CLASSES[str(place[2])]  # pydantic puts the method between the policy and its field
            place = (*place[:2], *place[3:])
        field = ".".join(map(str, place)) or "recipe"
        if fault["type"] == "extra_forbidden":
            hint = (
                _hint(owner, fault["loc"][3:], f"policies.{place[1]}.")
                if owner is not root
                else _hint(root, place)
            )
            faults.append(f"there is no field {field}{hint}")
            continue
        message = fault["msg"].removeprefix("Value error, ")
        value = f" (given {fault['input']!r})" if not isinstance(fault["input"], dict) else ""
        faults.append(f"{field}: {message}{value if len(value) < 80 else ''}")
    return "; ".join(faults)


def _hint(root: type[BaseModel], place: tuple[int | str, ...], above: str = "") -> str:
    """A suggestion for an unknown field: the same name in another section, or the nearest name in its own.

    Args:
        above: path of `root` in the recipe, with a dot at its end.
    """
    if root is Recipe and place[0] in CLASSES:
        return f" (did you mean policies: {{NAME: {{method: {place[0]}}}}}?)"
    model, wanted = root, _ALIASES.get(str(place[-1]), str(place[-1]))
    for part in place[:-1]:
        if isinstance(part, int):  # of a list
            continue
        known = model.model_fields.get(str(part))
        inner = _model_of(known.annotation) if known else None
        if inner is None:
            return ""
        model = inner
    near = difflib.get_close_matches(wanted, model.model_fields, n=1)
    same_name = [path for path in _paths(root) if path.rpartition(".")[2] == wanted]
    same_name.sort(key=lambda path: (path.count("."), path))
    if root is Recipe and len(place) == 1:  # most likely a setting of a policy's training
        own = [path for kind in CLASSES.values() for path in _paths(kind)]
        own += [f"parameters.{parameter}" for name in names() for parameter in get(name).parameters]
        same_name = [f"policies.NAME.{p}" for p in own if p.rpartition(".")[2] == wanted] + same_name
    if above and near and (wanted in near or not same_name):
        return f" (did you mean {above}{'.'.join(map(str, (*place[:-1], near[0])))}?)"
    suggestions = near if wanted in near or not same_name else same_name
    return f" (did you mean {above}{suggestions[0]}?)" if suggestions else ""


# Names of fields in other trainers.
_ALIASES = {"lr": "learning_rate", "bs": "batch_size", "max_tokens": "max_new_tokens", "lora_config": "lora"}


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The model of a section from its annotation, also of an optional section; None for other fields."""
    kinds = [annotation, *get_args(annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _paths(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """Dotted names of all fields of a model, including those of its sections."""
    for name, field in model.model_fields.items():
        yield above + name
        inner = _model_of(field.annotation)
        if inner is not None and inner is not model:
            yield from _paths(inner, f"{above}{name}.")
