"""The gate on unpaired rows: every rule broken on purpose, and it and nothing else must fail."""

import json
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from expectations.config import GateConfig
from expectations.rules import rules_of
from expectations.token_rules import PlainTokens
from tests.expectations.test_rules import BAD, copy_of, put, words
from tests.support.frames import clean_prompts, failed, row_number

Gate = Callable[..., Any]
TOKENS: dict[str, Any] = {
    "tokens": PlainTokens(words),
    "max_length": 160,
    "max_prompt_length": 60,
    "special_tokens": ["<|mine|>"],
}
STRICT = GateConfig.model_validate(
    {
        name: {"severity": "critical", "max_rate": 0.0}
        for name in ("duplicate", "template_tokens", "control_characters", "prompt_repeated", "over_long")
    }
)


def clean_unpaired(rows: int = 40, chat: bool = False) -> pd.DataFrame:
    """Distinct completions; every other one is desirable."""
    said = "There is a lot to say about that, and it is well worth the time: number {}."
    return clean_prompts(rows, chat).assign(
        completion=[said.format(i) for i in range(rows)], label=[i % 2 == 0 for i in range(rows)], ended=True
    )


def other_label(frame: pd.DataFrame) -> pd.DataFrame:
    """Row 7 becomes row 8 with the other label; both stay in the train split."""
    return copy_of(frame, 8, label=not frame.loc[8, "label"])


BREAKS: dict[str, tuple[str, Callable[[pd.DataFrame], pd.DataFrame], list[int]]] = {
    "no label, as the reader leaves it": (
        "fault",
        put(fault="label is missing", prompt="", completion=""),
        [BAD],
    ),
    "a bool for text": ("type", put(completion=True), [BAD]),
    "null for text": ("type", put(completion=None), [BAD]),
    "unknown split": ("split", put(split="test"), [BAD]),
    "empty prompt": ("empty_prompt", put(prompt=" \n"), [BAD]),
    "empty completion": ("empty_completion", put(completion=""), [BAD]),
    "whitespace completion": ("empty_completion", put(completion="\u00a0\t"), [BAD]),
    "both labels": ("contradiction", other_label, [BAD, 8]),
    "duplicate": ("duplicate", lambda f: copy_of(f, 3), [BAD]),
    "leakage": ("leakage", put(prompt="  what DO you know about\nthe rivers of town number 0?"), [BAD]),
    "own special token": ("special_tokens", put(completion="Then <|mine|> is not text, is it?"), [BAD]),
    "template token": ("template_tokens", put(completion="It is all well.<|eot_id|> Is it not so?"), [BAD]),
    "NUL": ("control_characters", put(completion="It is \x00 and that is all there is to it."), [BAD]),
    "replacement character": ("control_characters", put(prompt="What is caf\ufffd to you?"), [BAD]),
    "prompt in the answer": (
        "prompt_repeated",
        put(completion="What do you know about the clocks of town number 7? Not a lot."),
        [BAD],
    ),
    "over long": ("over_long", put(completion="It is far. " * 30), [BAD]),
}


def test_a_clean_frame_passes_every_rule(gate: Gate) -> None:
    first, _ = gate(clean_unpaired(), subject="unpaired", **TOKENS)
    report, kept = gate(clean_unpaired(), subject="unpaired", baseline=first.profile.model_dump(), **TOKENS)
    assert not report.refused
    assert not failed(report)
    assert kept.equals(clean_unpaired())
    judged = {f.rule for f in report.findings if not f.skipped}
    assert judged == {"unpaired/schema", *(f"unpaired/{name}" for name in rules_of("unpaired"))}


@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_row_is_found(gate: Gate, case: str) -> None:
    rule, break_it, rows = BREAKS[case]
    report, _ = gate(break_it(clean_unpaired()), subject="unpaired", config=STRICT, **TOKENS)
    assert report.refused
    found = failed(report)
    assert {name: f.rows for name, f in found.items()} == {rule: [row_number(i) for i in rows]}
    assert found[rule].remedy in found[rule].message


def test_the_refusal_speaks_of_labels(gate: Gate) -> None:
    from dpo_core.errors import GateRefused

    report, _ = gate(other_label(clean_unpaired()), subject="unpaired")
    with pytest.raises(
        GateRefused, match="refused the unpaired rows: unpaired/contradiction: 2 of 40"
    ) as caught:
        report.raise_if_refused()
    assert "the same answer and the other label" in caught.value.problem
    assert "two answers" not in str(caught.value)


def test_the_quarantine_drops_both_sides_of_a_contradiction(gate: Gate) -> None:
    config = GateConfig(quarantine="drop")
    report, kept = gate(other_label(clean_unpaired()), subject="unpaired", config=config)
    assert not report.refused
    assert report.dropped_by == {"unpaired/contradiction": 2}
    assert set(kept["row"]) == {row_number(i) for i in range(40)} - {row_number(BAD), row_number(8)}


def test_the_same_answer_to_another_prompt_is_no_contradiction(gate: Gate) -> None:
    frame = clean_unpaired()
    frame["completion"] = "There is a lot to say about that."
    assert not failed(gate(frame, subject="unpaired", config=STRICT)[0])


@pytest.mark.parametrize(("label", "share"), [(True, 1.0), (False, 0.0)])
def test_a_single_class_is_a_warning(gate: Gate, label: bool, share: float) -> None:
    report, _ = gate(clean_unpaired().assign(label=label), subject="unpaired")
    (finding,) = failed(report).values()
    assert (finding.rule, finding.severity) == ("unpaired/label_balance", "warning")
    assert finding.observed == share
    assert not report.refused


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.drop(columns=["label"]), "missing: label"),
        (lambda f: f.assign(label="yes"), "column label is str, not bool"),
        (lambda f: f.assign(label=1), "column label is integer, not bool"),
        (lambda f: f.assign(label=[None, *f["label"][1:]]), "column label is object with missing values"),
        (lambda f: f.drop(columns=["ended", "completion"]), "missing: completion, ended"),
        (lambda f: f.assign(completion=1), "column completion is integer, not text"),
    ],
)
def test_a_wrong_schema_is_refused(gate: Gate, change: Any, says: str) -> None:
    report, _ = gate(change(clean_unpaired()), subject="unpaired")
    assert report.refused
    assert says in failed(report)["schema"].message


def test_a_chat_that_is_repeated_in_the_answer_is_found(gate: Gate) -> None:
    frame = clean_unpaired(chat=True)
    turns = [{"role": "user", "content": "Is there a lot to say about that?"}]
    frame.loc[BAD, "prompt"] = json.dumps(turns, separators=(",", ":"))
    frame.loc[BAD, "completion"] = "Is there a lot to say about that? There is."
    report, _ = gate(frame, subject="unpaired", config=STRICT)
    assert {name: f.rows for name, f in failed(report).items()} == {"prompt_repeated": [row_number(BAD)]}


def test_too_few_rows_and_none(gate: Gate) -> None:
    assert set(failed(gate(clean_unpaired(19), subject="unpaired")[0])) == {"too_few"}
    report, kept = gate(clean_unpaired().iloc[:0], subject="unpaired", config=GateConfig(quarantine="drop"))
    assert set(failed(report)) == {"too_few"}
    assert not len(kept)


def test_drift_is_judged_on_the_completions(gate: Gate) -> None:
    baseline = gate(clean_unpaired(), subject="unpaired")[0].profile.model_dump()
    frame = clean_unpaired().assign(completion=[f"Я не знаю, что сказать об этом, {i}." for i in range(40)])
    found = failed(gate(frame, subject="unpaired", baseline=baseline)[0])
    # The prompts stay English, and with them the guess at the language of each row.
    assert set(found) == {"script_drift"}


def test_real_kto_rows_pass(gate: Gate, shared: Any) -> None:
    from dpo_core.data.config import DataConfig
    from dpo_core.data.load import load
    from dpo_core.data.split import split_by_prompt

    path = shared / "data" / "preference" / "llamafactory_kto_en_demo.json.gz"
    frame = split_by_prompt(load(DataConfig(path=str(path))).frame, 0.1, 0)
    report, kept = gate(frame, subject="unpaired")
    assert not report.refused, failed(report)
    assert len(kept) == 300
    balance = next(f for f in report.findings if f.rule == "unpaired/label_balance")
    assert balance.observed == 0.5
