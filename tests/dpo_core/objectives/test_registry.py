"""The registry: lookup, ranges, and that nothing can be declared without being read."""

from typing import Any

import pytest

from dpo_core.errors import RecipeError
from dpo_core.objectives import Parameter, get, names, objective
from dpo_core.objectives.registry import _OBJECTIVES


def test_every_objective_is_complete() -> None:
    assert {"dpo", "cdpo", "robust", "ipo_sum", "ipo_mean", "hinge"} <= set(names())
    for name in names():
        entry = get(name)
        assert entry.name == name
        assert entry.citation
        assert entry.function.__doc__
        for parameter in entry.parameters.values():
            assert parameter.low <= parameter.default <= parameter.high
            assert parameter.meaning


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(RecipeError) as caught:
        get("dpoo")
    assert "dpoo" in caught.value.problem
    assert all(name in caught.value.remedy for name in names())


def test_resolve_fills_defaults() -> None:
    assert get("cdpo").resolve({"beta": 1}) == {"beta": 1.0, "label_smoothing": 0.1}
    assert get("ipo_mean").resolve({}) == {"tau": 0.1}


@pytest.mark.parametrize(
    ("name", "values", "fragment"),
    [
        ("dpo", {"tau": 0.1}, "does not read the parameter 'tau'"),
        ("dpo", {"beta": 0.0}, "beta=0.0 is outside"),
        ("dpo", {"beta": float("nan")}, "beta=nan is outside"),
        ("robust", {"label_smoothing": 0.5}, "label_smoothing=0.5 is outside"),
    ],
)
def test_resolve_refuses(name: str, values: dict[str, float], fragment: str) -> None:
    with pytest.raises(RecipeError, match=fragment):
        get(name).resolve(values)


def test_a_new_family_registers_without_touching_the_registry() -> None:
    gamma = Parameter(1.0, 0.0, 2.0, "a test")

    @objective(citation="test", parameters={"gamma": gamma}, data="unpaired", reward_scale=None)
    def new(inputs: Any, *, gamma: float) -> Any:
        return inputs * gamma

    try:
        entry = get("new")
        assert entry.function is new
        assert entry.data == "unpaired"
    finally:
        del _OBJECTIVES["new"]


def test_declarations_must_match_what_the_function_reads() -> None:
    def dpo(inputs: Any, *, beta: float) -> Any:
        return inputs * beta

    beta = Parameter(1.0, 0.0, 2.0, "a test")
    with pytest.raises(ValueError, match="already registered"):
        objective(citation="test", parameters={"beta": beta})(dpo)
    dpo.__name__ = "other"
    with pytest.raises(ValueError, match="reads \\['beta'\\]"):
        objective(citation="test", parameters={"beta": beta, "gamma": beta})(dpo)
    with pytest.raises(ValueError, match="reward scale 'tau'"):
        objective(citation="test", parameters={"beta": beta}, reward_scale="tau")(dpo)
