"""Unpaired rows: of the wrong kind for the recipe, or with labels that cannot be learnt from."""

from tests.scenarios.bad_inputs import SIZES, Rows, World, bad, good_rows, lines

KTO = {"DPO": None, "KTO": {"method": "kto", **SIZES}}


def labelled() -> Rows:
    """Rows of both labels without a fault."""
    return [
        {"prompt": r["prompt"], "completion": r["chosen"], "label": bool(i % 2)}
        for i, r in enumerate(good_rows())
    ]


@bad(
    2, "the data are unpaired rows", "policy DPO learns from pairs", "Set policies.DPO.method to kto",
    adds="load-data",
)  # fmt: skip
def unpaired_for_an_objective_on_pairs(world: World) -> list[str]:
    return world.run_on(labelled())


@bad(3, "see above: unpaired/contradiction")
def unpaired_with_both_labels(world: World) -> list[str]:
    rows = labelled()
    return world.validate("rows.jsonl", lines([*rows, rows[3] | {"label": False}]))


@bad(
    2, "there are no two different training examples", "choose objective bco",
    adds="load-data validate-unpaired",
)  # fmt: skip
def unpaired_of_one_answer_for_kto(world: World) -> list[str]:
    rows = [
        {"prompt": "The soup", "completion": " was good.", "label": True},
        {"prompt": "The bread", "completion": " was bad.", "label": False},
    ]
    return world.run_on(rows, policies=KTO, evaluate={"samples_per_prompt": 2})


@bad(2, "there is no field policies.KTO.plus")
def unpaired_objective_in_a_sum(world: World) -> list[str]:
    return world.run(policies={"KTO": {"method": "kto", "plus": [{"objective": "sft"}]}})
