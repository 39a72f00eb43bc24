"""The graph of policies: the method, start and reference of each policy, and checks of the graph."""

import difflib
import re
from collections.abc import Iterable, Mapping
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, create_model

from dpo_core.config import Config
from dpo_core.errors import RecipeError
from dpo_core.methods.method import Method
from dpo_core.methods.registry import get, methods

REFERENCE = "SFT"
"""Name of the prepared reference in recipes and tables; no policy may have it."""
CHAMPION = "Champion"
"""Name of the registered champion in tables; no policy may have it."""
_METHOD = "A name from `dpo methods`."
_EXTERNAL_PREFIXES = ("models:/", "runs:/")
_NAME = re.compile(r"[\w +*&,()-]{1,40}")


class PolicyFields(Config):
    """The fields that every policy has in addition to the settings of its method."""

    method: str = Field(description=_METHOD)
    start: str = Field(REFERENCE, min_length=1)
    """Initial weights: SFT (the prepared reference), another policy, `models:/NAME@champion`,
    `models:/NAME/VERSION`, or `runs:/RUN/POLICY`."""
    reference: str = Field(REFERENCE, min_length=1)
    """The model that the KL term or the log-ratios compare with: SFT, another policy (Pre-DPO), or a model
    named as for `start`."""
    reward: Literal["source", "model"] | None = None
    """The reward of a method that samples: the known reward (`source`, set by `reward.source`), or a reward
    model trained on the pairs (`model`). Empty: the known reward if `reward.source` is set."""

    @property
    def entry(self) -> Method:
        """The method."""
        return get(self.method)

    @property
    def settings(self) -> Any:
        """The settings of the method, without the fields of `PolicyFields`."""
        own = self.model_dump(mode="json", exclude=set(PolicyFields.model_fields))
        return self.entry.settings.model_validate(own)

    @property
    def models(self) -> tuple[str, str]:
        """Its start and its reference."""
        return self.start, self.reference


def _policy_class(method: Method) -> type[PolicyFields]:
    title = method.name.title().replace("_", "")
    return create_model(
        f"{title}Policy",
        __base__=(method.settings, PolicyFields),
        __doc__=f"{method.title}: {method.citation}.",
        method=(Literal[method.name], Field(method.name, description=_METHOD)),  # type: ignore[arg-type]
    )


CLASSES: dict[str, type[PolicyFields]] = {
    method.name: _policy_class(method) for method in methods().values() if method.policy
}

if TYPE_CHECKING:
    Policy = PolicyFields
else:
    Policy = Annotated[reduce(or_, CLASSES.values()), Field(discriminator="method")]


def require_methods(policies: Any) -> Any:
    """Refuse a policy without a method that trains policies, with a clearer error than pydantic's.

    Raises:
        ValueError: a policy has no such method; pydantic adds the field.
    """
    for name, raw in policies.items() if isinstance(policies, Mapping) else ():
        if not isinstance(raw, Mapping | None):
            continue
        method = raw.get("method") if raw else None
        if method is None:
            raise ValueError(
                f"policy {name} names no method: set policies.{name}.method to one of {_known()}"
            )
        try:
            entry = get(str(method))
        except RecipeError as error:
            raise ValueError(f"policy {name}: {error.problem}; methods of policies: {_known()}") from error
        if not entry.policy:
            raise ValueError(f"policy {name}: method {method} trains no policy; choose one of {_known()}")
        try:
            CLASSES[entry.name].model_validate(raw)
        except RecipeError as error:  # an objective says what may be chosen
            raise ValueError(f"policy {name}: {error.problem}. {error.remedy.rstrip('.')}") from error
        except ValidationError:
            pass  # reported with its field when the whole recipe is validated
    return policies


def _known() -> str:
    return ", ".join(CLASSES)


def is_external(model: str) -> bool:
    """True if the name is of a model outside the recipe: from the registry or an earlier run."""
    return model.startswith(_EXTERNAL_PREFIXES)


def training_order(policies: Mapping[str, PolicyFields]) -> list[str]:
    """The policies in training order: each after those that it needs, else in the recipe's order.

    Raises:
        ValueError: a policy needs one that does not exist, or policies need each other.
    """
    done: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            cycle = " → ".join([*path[path.index(name) :], name])
            raise ValueError(f"policies need each other, so that none can be trained first: {cycle}")
        if name in done:
            return
        for field, model in zip(("start", "reference"), policies[name].models, strict=True):
            if model == REFERENCE or is_external(model):
                continue
            if model not in policies:
                raise ValueError(
                    f"policies.{name}.{field}: there is no policy '{model}'{_suggestion(model, policies)}"
                )
            visit(model, (*path, name))
        done.append(name)

    for name in policies:
        visit(name, ())
    return done


def _suggestion(name: str, policies: Iterable[str]) -> str:
    known = {policy.lower(): policy for policy in (REFERENCE, *policies)}
    if name.lower() == CHAMPION.lower():
        return "; the champion of a registered model is models:/NAME@champion"
    near = difflib.get_close_matches(name.lower(), known, n=1)
    return f" (did you mean {known[near[0]]}?)" if near else f"; there are {', '.join(known.values())}"


def check_names(policies: Mapping[str, PolicyFields]) -> None:
    """Refuse policy names that tables, metrics or files could not distinguish.

    Raises:
        ValueError: a name is reserved, too long, has invalid characters, or equals another one.
    """
    taken: dict[str, str] = {name.lower(): name for name in (REFERENCE, CHAMPION)}
    for name in policies:
        if not _NAME.fullmatch(name) or name != name.strip():
            raise ValueError(
                f"'{name}' cannot name a policy: use 1 to 40 letters, digits, blanks and _ - + * & , ( ), "
                "without blanks at its ends"
            )
        key = _as_metric(name)
        if other := taken.get(key):
            why = f"'{other}' and '{name}' differ only in case or punctuation, and would share metric names"
            if other in (REFERENCE, CHAMPION):
                why = f"'{other}' is the name of a model that every run has"
            raise ValueError(f"'{name}' cannot name a policy: {why}")
        taken[key] = name


def _as_metric(name: str) -> str:
    """A policy's name in metrics: lower case, with the characters that MLflow allows."""
    return re.sub(r"[^\w -]", "_", name.lower(), flags=re.ASCII)


def require_fields_used(policies: Mapping[str, PolicyFields], known_reward: bool) -> None:
    """Refuse fields of a policy that its method would ignore.

    Raises:
        ValueError: the first such field.
    """
    for name, policy in policies.items():
        settings = policy.settings
        if policy.entry.reference(settings) == "none" and policy.reference != REFERENCE:
            raise ValueError(
                f"policies.{name}.reference has no effect, because the objective '{settings.objective}' "
                "has no reference. Remove it"
            )
        if not policy.entry.scored and policy.reward is not None:
            raise ValueError(
                f"policies.{name}.reward has no effect, because method {policy.method} learns from labelled "
                "data. Remove it"
            )
        if policy.reward == "source" and not known_reward:
            raise ValueError(f"policies.{name}.reward is source, but reward.source is not set")
