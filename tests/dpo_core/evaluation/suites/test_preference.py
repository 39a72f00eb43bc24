"""Preference suites: readers, scores against the full softmax, and expected results."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_core.data.layouts.fields import PairFields
from dpo_core.errors import StageFailed
from dpo_core.evaluation.config import SuiteConfig
from dpo_core.evaluation.model_under_test import ModelUnderTest
from dpo_core.evaluation.results import Outcome, compute_measures
from dpo_core.evaluation.suites.preference import SUITES, Labelled
from dpo_core.evaluation.suites.registry import find
from dpo_core.evaluation.suites.rows import sample_prompts
from dpo_core.models.load import load_model
from dpo_core.statistics.estimates import Estimate
from tests.support.models.logps import full_logps
from tests.support.models.tiny import make_tiny_model

FP32 = SuiteConfig(precision="fp32")
PAIRS = [
    ("Name a sea.", "The North Sea.", "Seven.", False),
    ("Name a sea.", "The Baltic.", "A long and quiet house by the sea.", False),
    ("Is the soup warm?", "Yes.", "No, it came cold.", True),
    ("Say good.", "good", "bad and boring", False),
]


def rows(pairs: list[tuple[str, str, str, bool]] = PAIRS) -> list[dict[str, Any]]:
    return [
        {"labelled": Labelled(str(n), PairFields(prompt, False, better, worse), "", tied)}
        for n, (prompt, better, worse, tied) in enumerate(pairs, 1)
    ]


def run(subject: ModelUnderTest, rows: list[dict[str, Any]], config: SuiteConfig = FP32) -> Outcome:
    return find("hh").run(subject, rows, config)


def estimates(outcome: Outcome) -> dict[str, Estimate]:
    return {m.name: m.estimate for m in compute_measures(outcome.items, outcome.specs) if not m.subset}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("other"), seed=1)


def test_values_are_those_of_the_full_softmax(tiny: Path, other: Path) -> None:
    subject = ModelUnderTest(tiny, "tiny", reference=ModelUnderTest(other, "other"))
    outcome = run(subject, rows())
    policy, reference = load_model(tiny), load_model(other)
    for item, (prompt, better, worse, tied) in zip(outcome.items, PAIRS, strict=True):
        row = {
            "id": item.id, "chat": True, "chosen": better, "rejected": worse, "chosen_ended": True,
            "rejected_ended": True, "prompt": json.dumps([{"role": "user", "content": prompt}]),
        }  # fmt: skip
        pair = subject.tokenise.pair(row)
        assert not isinstance(pair, str)
        gains, likelihoods, lengths = [], [], []
        for side in (pair.chosen, pair.rejected):
            ours = full_logps(policy, side).sum().item()
            gains.append(ours - full_logps(reference, side).sum().item())
            likelihoods.append(ours)
            lengths.append(len(side.completion))
        gap = gains[0] - gains[1]
        if tied:
            assert item.values == {
                "likelihood_accuracy": 0.5, "likelihood_accuracy_per_token": 0.5, "accuracy": 0.5,
            }  # fmt: skip
            continue
        assert item.values["margin"] == pytest.approx(gap, abs=1e-4)
        per_token = gains[0] / lengths[0] - gains[1] / lengths[1]
        assert item.values["margin_per_token"] == pytest.approx(per_token, abs=1e-4)
        assert item.values["accuracy"] == float(gap > 0)
        assert item.values["likelihood_accuracy"] == float(likelihoods[0] > likelihoods[1])
        p = 1 / (1 + math.exp(-0.1 * gap))
        assert item.values["brier"] == pytest.approx((1 - p) ** 2, abs=1e-5)
        assert item.values["nll"] == pytest.approx(-math.log(p), abs=1e-5)
        assert ("accuracy_better_shorter" in item.values) == (lengths[0] < lengths[1])


def test_a_tie_of_people_counts_half_and_prompts_are_resampled(tiny: Path, other: Path) -> None:
    outcome = run(ModelUnderTest(tiny, "tiny", reference=ModelUnderTest(other, "other")), rows())
    measures = estimates(outcome)
    decided = [item.values["accuracy"] for item in outcome.items if "margin" in item.values]
    assert measures["accuracy"].value == pytest.approx((sum(decided) + 0.5) / 4)
    assert measures["accuracy_decided"].value == pytest.approx(sum(decided) / 3)
    assert measures["accuracy"].n == 3, "two pairs share a prompt"
    assert {m.name for m in outcome.others} == {"length_spearman"}, "too few pairs for a calibration error"
    many = run(ModelUnderTest(tiny, "tiny", reference=ModelUnderTest(other, "other")), rows(PAIRS * 40))
    (ece,) = (m.estimate for m in many.others if m.name == "ece")
    assert 0 <= ece.low <= ece.high


def test_a_model_is_no_better_than_itself(tiny: Path) -> None:
    measures = estimates(run(ModelUnderTest(tiny, "tiny", reference=ModelUnderTest(tiny, "itself")), rows()))
    assert measures["accuracy"].value == 0.5
    assert measures["margin"].value == 0.0
    assert measures["nll"].value == pytest.approx(math.log(2))


def test_without_a_reference_only_likelihoods_are_measured(tiny: Path) -> None:
    outcome = run(ModelUnderTest(tiny, "tiny"), rows())
    assert set(estimates(outcome)) == {
        "likelihood_accuracy", "likelihood_accuracy_per_token", "better_longer",
    }  # fmt: skip
    assert outcome.settings["reference"] is None


def test_batches_do_not_change_the_values(tiny: Path, other: Path) -> None:
    def values(budget: int) -> list[dict[str, float]]:
        subject = ModelUnderTest(tiny, "tiny", reference=ModelUnderTest(other, "other"))
        config = SuiteConfig(precision="fp32", token_budget=budget)
        return [item.values for item in run(subject, rows(), config).items]

    for first, second in zip(values(64), values(4096), strict=True):
        assert first == pytest.approx(second, abs=1e-4)


def test_rows_that_cannot_be_used_are_counted(tiny: Path) -> None:
    given = [*rows(), {"fault": "an answer is empty"}, {"fault": "an answer is empty"}]
    assert run(ModelUnderTest(tiny, "tiny"), given).facts["left_out"] == {"an answer is empty": 2}
    with pytest.raises(StageFailed, match="none of the pairs can be scored"):
        run(ModelUnderTest(tiny, "tiny"), [{"fault": "an answer is empty"}])


def test_a_limit_takes_whole_prompts_and_the_same_each_time() -> None:
    items = [f"{prompt}{n}" for prompt in "abcdefgh" for n in range(3)]
    sampled = sample_prompts(items, lambda item: item[0], 10, 3)
    assert sampled == sample_prompts(items, lambda item: item[0], 10, 3)
    assert len(sampled) == 9
    assert all(f"{item[0]}{n}" in sampled for item in sampled for n in range(3))
    assert sampled != sample_prompts(items, lambda item: item[0], 10, 4)


@pytest.mark.parametrize(
    ("name", "usable", "subsets", "ties"),
    [
        ("hh", 2303, {""}, 0),
        ("hhh", 221, {"helpful", "harmless", "honest", "other"}, 0),
        ("llmbar", 419, {"natural", "adv_neighbor", "adv_gptinst", "adv_gptout", "adv_manual"}, 0),
        ("pandalm", 939, {""}, 103),
    ],
)
def test_real_files(shared: Path, name: str, usable: int, subsets: set[str], ties: int) -> None:
    suite = find(name)
    file = shared / "data" / "preference" / suite.files[0]
    if not file.is_file():
        pytest.skip(f"no {file}")
    labelled = [row["labelled"] for row in suite.read(file) if "labelled" in row]
    assert len(labelled) == usable
    assert {row.subset for row in labelled} == subsets
    assert sum(row.tied for row in labelled) == ties
    assert len({row.id for row in labelled}) == usable


def test_llmbar_puts_the_better_output_first(tmp_path: Path) -> None:
    path = tmp_path / "llmbar_natural.json.gz"
    given = [
        {"input": "Q", "output_1": "one", "output_2": "two", "label": 2},
        {"input": "Q", "output_1": "one", "output_2": "two", "label": 3},
    ]
    path.write_bytes(gzip.compress(json.dumps(given).encode()))
    first, second = find("llmbar").read(path)
    assert (first["labelled"].pair.chosen, first["labelled"].pair.rejected) == ("two", "one")
    assert "label" in second["fault"]


def test_every_suite_has_a_name_of_its_own() -> None:
    assert len({suite.name for suite in SUITES}) == len(SUITES)
    assert np.all([suite.files and suite.source for suite in SUITES])
