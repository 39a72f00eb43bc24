"""Notes on the page about the sets of a mixture, and the accuracy on each."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from dpo_core.data.tokens.sequences import TokenPair, TokenSequence
from dpo_core.jobs.evaluate import _accuracy_by_source
from dpo_core.statistics.estimates import Estimate
from tasks.reports.about import RunData
from tasks.reports.data_notes import data_notes
from tasks.reports.run_report import EvaluationDetails, Sample, Turn
from tasks.stages.evaluation import with_data
from tasks.store.manifest import Manifest


def test_accuracy_of_each_set() -> None:
    side = TokenSequence((1,), (2,))
    pairs = [TokenPair(name, side, side) for name in "abcde"]
    # Chosen and rejected in turn; the reference says 0 to all.
    ours = [torch.tensor([value]) for value in (1.0, 0.0, 0.0, 1.0, 2.0, 1.0, 3.0, 1.0, 0.0, 9.0)]
    theirs = [torch.zeros(1)] * 10
    sources = {"a": "x", "b": "x", "c": "y", "d": "y"}  # e is of no set
    accuracies = _accuracy_by_source(pairs, ours, theirs, sources)
    assert {name: (accuracy["value"], accuracy["n"]) for name, accuracy in accuracies.items()} == {
        "x": (0.5, 2),
        "y": (1.0, 2),
    }
    assert _accuracy_by_source(pairs, ours, theirs, {}) == {}


def data(loaded: Manifest) -> RunData:
    return RunData(loaded, base=loaded, prompts=loaded, rows=loaded, kind="pairs")


def test_notes_of_the_page(tmp_path: Path) -> None:
    loaded = Manifest(
        kind="dataset", uri=tmp_path.as_uri(), sha256="0" * 64, schema_version=1, stage="load-data",
        stage_version=1, config_digest="0" * 64,
        extra={"kind": "pairs", "remarks": ["columns not read: hint"],
               "sources": {"x": {"train": 8, "eval": 2}}},
    )  # fmt: skip
    accuracy = Estimate(value=0.5, low=0.1, high=0.9, n=2)
    measured = EvaluationDetails(
        reward_name="sentiment", reward_is_true=True, n_prompts=2, samples_per_prompt=1, policies=[],
        held_out_pairs=2, accuracy_by_source={"DPO": {"x": accuracy}},
    )  # fmt: skip
    assert data_notes(data(loaded), measured) == {
        "How the data were read": "columns not read: hint",
        "Rows by set": "x: 8 to train on, 2 held out",
        "Preference accuracy of DPO by set": "x: 50.0% [10.0% to 90.0%] of 2 pairs",
    }
    plain = loaded.model_copy(update={"extra": {"kind": "pairs"}})
    assert data_notes(data(plain), measured.model_copy(update={"accuracy_by_source": {}})) == {}


@pytest.mark.parametrize(
    ("columns", "answers"),
    [
        ({"chosen": ["Seven.", "Blue."]}, ["Seven.", "Blue."]),
        ({"completion": ["Nine.", "Blue."], "label": [False, True]}, ["", "Blue."]),
        ({}, ["", ""]),
    ],
)
def test_samples_get_their_conversation_and_the_datas_answer(
    columns: dict[str, list[Any]], answers: list[str]
) -> None:
    call = {"role": "assistant", "content": None}
    chat = json.dumps([{"role": "user", "content": "Name a colour."}, call])
    rows = pd.DataFrame({"prompt": ["Name a prime.", chat]} | columns)
    plain, asked = with_data(
        [
            Sample(prompt="Name a prime.", completions={}),
            Sample(prompt="user: Name a colour.", completions={}),
        ],
        ["Name a prime.", chat],
        rows,
    )
    assert (plain.turns, asked.turns) == (
        [],
        [Turn(role="user", content="Name a colour."), Turn(role="assistant", content="")],
    )
    assert [plain.chosen, asked.chosen] == answers
