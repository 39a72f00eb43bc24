"""Registry of the objectives: the function, data, parameters and value at the reference of each."""

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator

from dpo_core.errors import RecipeError
from dpo_core.objectives.common import ln_2
from dpo_core.objectives.parameter import Parameter
from dpo_core.objectives.variants import VARIANTS

if TYPE_CHECKING:
    from torch import Tensor

    from dpo_core.objectives.inputs import PairLogps

Function = TypeVar("Function", bound=Callable[..., Any])
Extra = Literal["kl", "common", "prompt", "sharpness"]


@dataclass(frozen=True)
class Objective:
    """A registered objective.

    The function takes one dataclass of tensors (`PairLogps` for `data="pairs"`, `UnpairedLogps` for
    `data="unpaired"`) and its parameters by keyword, and returns one loss per example. The reduction belongs
    to the trainer: the mean over the examples of the GLOBAL batch.
    """

    name: str
    """The name of its function."""
    function: Callable[..., Any]
    citation: str
    """Authors, title, venue and identifier of the paper."""
    parameters: Mapping[str, Parameter]
    data: Literal["pairs", "unpaired"] = "pairs"
    needs_reference: bool = True
    """False: the reference log-probs are not read and may be zeros."""
    value_at_reference: Callable[[Mapping[str, float]], float | None] | None = ln_2
    """The exact loss if policy and reference are the same model (with z_0 and delta 0). None, or a result of
    None for the parameters, if there is no such value."""
    extras: Collection[Extra] = ()
    """Which optional fields of `PairLogps` the function reads."""
    batch_coupled: bool = False
    """True: the function sorts over its batch, so the global batch has to be one forward pass."""
    reward_scale: str | None = "beta"
    """The parameter that turns a log-ratio into the implicit reward of `pair_metrics`; None: scale 1."""
    rewards_per_token: bool = False
    """True: `pair_metrics` takes the rewards from mean log-probs, without reference."""
    caveat: str = ""
    """What its name does not show: coupled examples, omitted parts, unverified details."""

    def __post_init__(self) -> None:
        arguments = inspect.signature(self.function).parameters.values()
        read = {argument.name for argument in arguments if argument.kind is argument.KEYWORD_ONLY}
        if read != set(self.parameters):
            declared = sorted(self.parameters)
            raise ValueError(f"'{self.name}' declares {declared} but its function reads {sorted(read)}")
        if self.reward_scale is not None and self.reward_scale not in self.parameters:
            raise ValueError(
                f"the reward scale '{self.reward_scale}' of '{self.name}' is not among its parameters"
            )

    @property
    def needs_full_vocabulary(self) -> bool:
        """True: the function compares whole next-token distributions of policy and reference.

        Cached log-probs do not suffice then: the reference has to be live, in memory beside the policy.
        """
        return "kl" in self.extras

    def needs(self) -> list[str]:
        """The data and reference that it needs, and whether it needs the whole batch, for display."""
        live = "live reference" if self.needs_full_vocabulary else "reference"
        return [
            self.data,
            *([live] if self.needs_reference else []),
            *(["whole batch"] if self.batch_coupled else []),
        ]

    def facts(self) -> dict[str, Any]:
        """All facts of the objective as plain JSON data."""
        return {
            "name": self.name,
            "setting": f"policies: {{NAME: {{method: {_METHODS[self.data]}, objective: {self.name}}}}}",
            "needs": self.needs(),
            "caveat": self.caveat,
            "definition": inspect.getdoc(self.function),
            "citation": self.citation,
            "data": self.data,
            "needs_reference": self.needs_reference,
            "needs_full_vocabulary": self.needs_full_vocabulary,
            "batch_coupled": self.batch_coupled,
            "extras": sorted(self.extras),
            "reward_scale": self.reward_scale,
            "rewards_per_token": self.rewards_per_token,
            "value_at_reference": self.value_at_reference and self.value_at_reference(self.resolve({})),
            "parameters": {name: parameter._asdict() for name, parameter in self.parameters.items()},
        }

    def resolve(self, values: Mapping[str, float]) -> dict[str, float]:
        """The values of all parameters, with defaults filled in.

        Raises:
            RecipeError: a parameter that this objective does not read, or a value outside its range.
        """
        for name, value in values.items():
            if name not in self.parameters:
                known = ", ".join(self.parameters) or "none"
                raise RecipeError(
                    f"objective '{self.name}' does not read the parameter '{name}'",
                    f"Remove it; the parameters of '{self.name}' are: {known}.",
                )
            _, low, high, meaning = self.parameters[name]
            if not low <= value <= high:  # also refuses NaN
                raise RecipeError(
                    f"{name}={value} is outside the range of objective '{self.name}'",
                    f"Choose {name} ({meaning}) in [{low:g}, {high:g}].",
                )
        return {
            name: float(values.get(name, parameter.default)) for name, parameter in self.parameters.items()
        }

    def unusual(self, values: Mapping[str, float]) -> list[str]:
        """A warning for each parameter far from its default, which may be meant for another objective.

        Defaults differ between objectives: DPO's beta is 0.1, SimPO's 2.
        """
        warnings = []
        for name, value in values.items():
            default = self.parameters[name].default
            if not value or not default or 1 / _UNUSUAL_TIMES < value / default < _UNUSUAL_TIMES:
                continue
            usual = _OBJECTIVES["dpo"].parameters.get(name)
            whose = f"; {value:g} is dpo's" if usual and usual.default == value else ""
            warnings.append(f"{self.name} with {name} {value:g} (its default: {default:g}{whose})")
        return warnings


_METHODS = {"pairs": "dpo", "unpaired": "kto"}
"""The method that uses objectives, by their kind of data."""

# A tenth of a default and ten times a default are common choices.
_UNUSUAL_TIMES = 11
_OBJECTIVES: dict[str, Objective] = {}


def objective(
    *, citation: str, parameters: Mapping[str, Parameter], **facts: Any
) -> Callable[[Function], Function]:
    """Register the decorated function under its name; the function itself is returned unchanged.

    Args:
        facts: further fields of `Objective`.

    Raises:
        ValueError: the name is taken, or the declared parameters are not exactly the keyword-only arguments
            of the function, so that no parameter is accepted without being read.
    """

    def register(function: Function) -> Function:
        name = function.__name__
        if name in _OBJECTIVES:
            raise ValueError(f"an objective named '{name}' is already registered")
        _OBJECTIVES[name] = Objective(name, function, citation, parameters, **facts)
        return function

    return register


def names() -> list[str]:
    """The registered names, sorted."""
    return sorted(_OBJECTIVES)


def _as_registered(name: str) -> str:
    return name.lower() if name.lower() in _OBJECTIVES else name


ObjectiveName = Annotated[str, AfterValidator(_as_registered)]
"""The name of an objective in a recipe; case does not matter: SimPO is simpo."""


def get(name: str) -> Objective:
    """The objective called `name`.

    Raises:
        RecipeError: there is none; the message lists all names, or shows the settings of a variant.
    """
    if name not in _OBJECTIVES:
        settings = {variant.name: variant.setting for variant in VARIANTS}
        remedy = f"Choose one of: {', '.join(names())}."
        if name in settings:
            remedy = f"It is made of settings; write {settings[name]}"
        near = difflib.get_close_matches(name, _OBJECTIVES, n=1)
        hint = f" (did you mean {near[0]}?)" if near and name not in settings else ""
        raise RecipeError(f"there is no objective '{name}'{hint}", remedy)
    return _OBJECTIVES[name]


class Term(NamedTuple):
    """One objective of a weighted sum."""

    name: str
    weight: float
    parameters: Mapping[str, float]
    """As `Objective.resolve` returns them."""


def combine(terms: Iterable[Term], logps: "PairLogps") -> "Tensor":
    """Σ weight·loss of each pair (B,) over terms on pairs: RPO is dpo + α·sft, MPO dpo, bco_pair and sft.

    Raises:
        ValueError: there is no term.
    """
    losses = [weight * get(name).function(logps, **parameters) for name, weight, parameters in terms]
    if not losses:
        raise ValueError("a weighted sum needs at least one term")
    return sum(losses[1:], start=losses[0])
