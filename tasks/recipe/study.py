"""Studies: the policies of a recipe over a grid of settings and over seeds, as a list of trainings."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from dpo_core.config import Config
from dpo_core.errors import RecipeError
from tasks.recipe.policies import (
    CLASSES,
    REFERENCE,
    PolicyFields,
    is_external,
    require_fields_used,
    training_order,
)

Grid = dict[str, list[Any]]
"""Values of fields, by dotted name; every combination is a point."""


class StudyConfig(Config):
    """Policies over a grid and seeds, measured on the same prompts and compared at equal KL."""

    seeds: list[Annotated[int, Field(ge=0, strict=True)]] = Field([0, 1, 2], min_length=1)
    """Seeds of training: order of examples, sampling, reward model. Data and reference are shared."""
    grid: dict[str, Grid | list[Grid]] = Field(default_factory=dict)
    """The fields that vary, by policy: `DPO: {parameters.beta: [0.1, 0.5]}`, or a list of such grids."""
    kl_at: list[Annotated[float, Field(gt=0)]] = Field([2.0, 5.0, 10.0], min_length=1)
    """KLs, in nats, at which rewards are compared; chosen before the results are seen."""
    best_of: list[Annotated[int, Field(ge=1)]] = Field([2, 4, 8, 16])
    """The best of so many samples of the reference, as a line to compare with."""
    hidden: list[str] = Field(default_factory=list)
    """Policies that the figures leave out, such as those that only serve as reference of another."""
    parallel: int = Field(1, ge=1)
    """Policies trained at the same time; give each engine its share of the cores (`engine.threads`)."""

    @model_validator(mode="after")
    def _check_grid(self) -> "StudyConfig":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"a seed is listed twice: {self.seeds}")
        for name in self.grid:
            labels = [label(point) for point in self.points(name)]
            if not labels:
                raise ValueError(f"grid.{name} has no point: give each field at least one value")
            if len(set(labels)) < len(labels):
                raise ValueError(f"grid.{name} has a point twice: {labels}")
            for key in {key for point in self.points(name) for key in point}:
                above = [
                    other for point in self.points(name) for other in point if key.startswith(f"{other}.")
                ]
                if above:
                    raise ValueError(f"grid.{name}: {above[0]} would overwrite {key}; give one of them")
        return self

    def points(self, policy: str) -> list[dict[str, Any]]:
        """The points of a policy; one without changes where the grid does not name it."""
        grids = self.grid.get(policy, {})
        return [
            dict(zip(grid, values, strict=True))
            for grid in (grids if isinstance(grids, list) else [grids])
            for values in product(*grid.values())
        ]


def label(point: Mapping[str, Any]) -> str:
    """A point as text: "beta=0.1", with the last part of each field's name."""
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in point.items())


@dataclass(frozen=True)
class PlannedPolicy:
    """One policy to train: in a study, at one point of its grid and with one seed."""

    policy: str
    config: PolicyFields
    seed: int
    point: str | None = None
    """The point as text; None outside a study."""

    @property
    def label(self) -> str:
        """Distinguishes its stages from others of the same name."""
        if self.point is None:
            return f" {self.policy}"
        return f" {self.policy}{' ' + self.point if self.point else ''} seed {self.seed}"

    @property
    def needs(self) -> list[tuple[str, int]]:
        """The policies that it starts from or uses as reference, with their seed."""
        return [(m, self.seed) for m in self.config.models if m != REFERENCE and not is_external(m)]


def nodes(
    policies: Mapping[str, PolicyFields], study: StudyConfig | None, seed: int
) -> Iterator[PlannedPolicy]:
    """Every training, each after those that it needs.

    In a study all policies of one seed come before the next seed, so that a stopped study can compare them.

    Raises:
        ValueError: the graph has a cycle or an unknown name.
        RecipeError, pydantic.ValidationError: a point of the grid is no valid setting.
    """
    order = training_order(policies)
    if study is None:
        yield from (PlannedPolicy(name, policies[name], seed) for name in order)
        return
    for study_seed in study.seeds:
        for name in order:
            for point in study.points(name):
                yield PlannedPolicy(name, with_changes(policies[name], point), study_seed, label(point))


def with_changes(policy: PolicyFields, changes: Mapping[str, Any]) -> PolicyFields:
    """A copy of the policy with new values of fields, by dotted name.

    Raises:
        RecipeError, pydantic.ValidationError: a field is unknown, or its value out of range.
    """
    fields = policy.model_dump(mode="json")
    for key, value in changes.items():
        *path, last = key.split(".")
        place = fields
        for part in path:
            if place.get(part) is None:  # a section that is empty by default, as `lora`
                place[part] = {}
            place = place[part]
            if not isinstance(place, dict):
                raise RecipeError(
                    f"{key}: {part} is a single value and has no fields",
                    "Name a field of the policy, such as beta or optim.learning_rate",
                )
        place[last] = copy.deepcopy(value)
    return CLASSES[policy.method].model_validate(fields)


def check_study(policies: Mapping[str, PolicyFields], study: StudyConfig) -> None:
    """Refuse a study with an invalid grid before anything is trained.

    Raises:
        ValueError: the first fault.
    """
    for field, names in (("grid", study.grid), ("hidden", study.hidden)):
        unknown = [name for name in names if name not in policies]
        if unknown:
            raise ValueError(
                f"study.{field}: there is no policy '{unknown[0]}'; there are {', '.join(policies)}"
            )
    for name, policy in policies.items():
        for model in policy.models:
            if model in policies and len(study.points(model)) > 1:
                raise ValueError(
                    f"policy {name} needs {model}, which study.grid gives {len(study.points(model))} points: "
                    "it is unclear which of them. Give that policy one point, or define a policy for each"
                )
        trainings: list[PolicyFields] = []
        for point in study.points(name):
            fixed = [key for key in point if key.split(".")[0] in ("method", "start", "reference", "reward")]
            if fixed:
                raise ValueError(f"study.grid.{name}: {fixed[0]} cannot vary; define a policy for each value")
            try:
                trainings.append(with_changes(policy, point))
                require_fields_used({name: trainings[-1]}, known_reward=True)
            except (ValueError, RecipeError) as error:
                what = str(error).rstrip(".")
                if isinstance(error, ValidationError):  # a ValueError too
                    first = error.errors()[0]
                    what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
                raise ValueError(f"study.grid.{name}, point {label(point) or 'as it is'}: {what}") from error
            if trainings[-1] in trainings[:-1]:
                raise ValueError(f"study.grid.{name}: two points are the same training: {label(point)}")
