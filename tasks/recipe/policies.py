"""The graph of policies: how each is trained, what it starts from and what it is held to."""

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
"""What recipes and tables call the prepared reference; no policy may have this name."""
CHAMPION = "Champion"
"""What tables call the registered champion; no policy may have this name."""
_METHOD = "A name from `dpo methods`."
_ELSEWHERE = ("models:/", "runs:/")
_NAME = re.compile(r"[\w +*&,()-]{1,40}")


class PolicyFields(Config):
    """What every policy has beside the settings of its method."""

    method: str = Field(description=_METHOD)
    start: str = Field(REFERENCE, min_length=1)
    """Initial weights: SFT (the prepared reference), another policy, `models:/NAME@champion`,
    `models:/NAME/VERSION`, or `runs:/RUN/POLICY`."""
    reference: str = Field(REFERENCE, min_length=1)
    """What the policy is held to, by its KL term or its log-ratios: SFT, another policy (Pre-DPO), or a model
    named as for `start`."""
    reward: Literal["source", "model"] | None = None
    """What a method that samples learns from: the known reward (`reward.source`), or a reward model trained
    on the pairs. Empty: the known one where there is one."""

    @property
    def entry(self) -> Method:
        """The method."""
        return get(self.method)

    @property
    def settings(self) -> Any:
        """The settings of the method alone, which decide its training."""
        own = self.model_dump(mode="json", exclude=set(PolicyFields.model_fields))
        return self.entry.settings.model_validate(own)

    @property
    def models(self) -> tuple[str, str]:
        """What it starts from and what it is held to."""
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
    """Refuse a policy that names no method, or none that trains policies, in words of its own.

    Raises:
        ValueError: so that pydantic names the field.
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
            known = get(str(method))
        except RecipeError as error:
            raise ValueError(f"policy {name}: {error.problem}; methods of policies: {_known()}") from error
        if not known.policy:
            raise ValueError(f"policy {name}: method {method} trains no policy; choose one of {_known()}")
        try:
            CLASSES[known.name].model_validate(raw)
        except RecipeError as error:  # an objective says what may be chosen
            raise ValueError(f"policy {name}: {error.problem}. {error.remedy.rstrip('.')}") from error
        except ValidationError:
            pass  # told with its field when the recipe is read
    return policies


def _known() -> str:
    return ", ".join(CLASSES)


def elsewhere(model: str) -> bool:
    """Whether a name is that of a model outside the recipe: of the registry, or of an earlier run."""
    return model.startswith(_ELSEWHERE)


def in_order(policies: Mapping[str, PolicyFields]) -> list[str]:
    """The names of the policies, each after those that it needs, else as the recipe lists them.

    Raises:
        ValueError: a policy needs one that there is not, or policies need each other.
    """
    done: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            cycle = " → ".join([*path[path.index(name) :], name])
            raise ValueError(f"policies need each other, so that none can be trained first: {cycle}")
        if name in done:
            return
        for field, model in zip(("start", "reference"), policies[name].models, strict=True):
            if model == REFERENCE or elsewhere(model):
                continue
            if model not in policies:
                raise ValueError(
                    f"policies.{name}.{field}: there is no policy '{model}'{_near(model, policies)}"
                )
            visit(model, (*path, name))
        done.append(name)

    for name in policies:
        visit(name, ())
    return done


def _near(name: str, policies: Iterable[str]) -> str:
    known = {policy.lower(): policy for policy in (REFERENCE, *policies)}
    if name.lower() == CHAMPION.lower():
        return "; the champion of a registered model is models:/NAME@champion"
    near = difflib.get_close_matches(name.lower(), known, n=1)
    return f" (did you mean {known[near[0]]}?)" if near else f"; there are {', '.join(known.values())}"


def check_names(policies: Mapping[str, PolicyFields]) -> None:
    """Refuse names that tables, metrics or files could not tell apart.

    Raises:
        ValueError: a name is taken, too long, has characters that a table or a query cannot hold, or is there
            twice.
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
            why = f"'{other}' and '{name}' differ in capitals or signs alone, and share their metrics' names"
            if other in (REFERENCE, CHAMPION):
                why = f"'{other}' is the name of a model that every run has"
            raise ValueError(f"'{name}' cannot name a policy: {why}")
        taken[key] = name


def _as_metric(name: str) -> str:
    """A policy's name as metrics have it: in small letters, with the signs that MLflow takes."""
    return re.sub(r"[^\w -]", "_", name.lower(), flags=re.ASCII)


def check_is_read(policies: Mapping[str, PolicyFields], known_reward: bool) -> None:
    """Refuse fields that a policy's method would not read.

    Raises:
        ValueError: so.
    """
    for name, policy in policies.items():
        settings = policy.settings
        if policy.entry.reference(settings) == "none" and policy.reference != REFERENCE:
            raise ValueError(
                f"policies.{name}.reference would not be read: '{settings.objective}' has no reference"
            )
        if not policy.entry.scored and policy.reward is not None:
            raise ValueError(
                f"policies.{name}.reward would not be read: method {policy.method} learns from labelled data"
            )
        if policy.reward == "source" and not known_reward:
            raise ValueError(f"policies.{name}.reward is source, and reward.source names none")
