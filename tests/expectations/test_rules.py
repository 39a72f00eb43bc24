"""Every rule broken on purpose in one row of a clean frame: it and nothing else must fail, naming the row."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dpo_core.data.config import DataConfig
from dpo_core.data.load import load
from dpo_core.data.split import split_by_prompt
from dpo_core.errors import GateRefused
from expectations.config import GateConfig
from expectations.drift import Profile
from expectations.rules import rules_of
from tests.support.frames import PlainTokens, clean_pairs, clean_prompts, failed, row_number

BAD = 7  # the broken row, in the train split
Gate = Callable[..., Any]


def words(text: str) -> list[int]:
    """A lossless toy tokenizer: one token a character."""
    return [ord(c) for c in text]


# Without tolerance each broken row must show, and the rules that are warnings by default must refuse.
STRICT = GateConfig.model_validate(
    {
        name: {"severity": "critical", "max_rate": 0.0}
        for name in ("duplicate", "template_tokens", "control_characters", "prompt_repeated", "over_long")
    }
)


def put(**values: Any) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        frame = frame.copy()
        for name, value in values.items():
            if not isinstance(value, str) or not value.isprintable():  # str columns take no surrogates
                frame[name] = frame[name].astype(object)
            frame.loc[BAD, name] = value
        return frame

    return change


def copy_of(frame: pd.DataFrame, source: int, **changes: Any) -> pd.DataFrame:
    """Row BAD becomes row `source` with changes; id, row and split stay its own."""
    frame = frame.copy()
    for name in frame.columns.difference(["id", "row", "split"]):
        frame.loc[BAD, name] = changes.get(name, frame.loc[source, name])
    return frame


def turned(frame: pd.DataFrame) -> pd.DataFrame:
    return copy_of(frame, 8, chosen=frame.loc[8, "rejected"], rejected=frame.loc[8, "chosen"])


def turned_as_chat(frame: pd.DataFrame) -> pd.DataFrame:
    """The same pair turned round, its prompt a conversation of one turn in place of text."""
    turns = [{"role": "user", "content": frame.loc[8, "prompt"]}]
    changed = turned(frame)
    changed.loc[BAD, "prompt"] = json.dumps(turns, ensure_ascii=False, separators=(",", ":"))
    changed.loc[BAD, "chat"] = True
    return changed


PAIR_BREAKS: dict[str, tuple[str, Callable[[pd.DataFrame], pd.DataFrame], list[int]]] = {
    "fault": ("fault", put(fault="field rejected is missing", prompt="", chosen="", rejected=""), [BAD]),
    "a bool for text": ("type", put(chosen=True), [BAD]),
    "null for text": ("type", put(rejected=None), [BAD]),
    "unknown split": ("split", put(split="test"), [BAD]),
    "empty prompt": ("empty_prompt", put(prompt=" \n"), [BAD]),
    "empty chosen": ("empty_chosen", put(chosen=""), [BAD]),
    "whitespace chosen": ("empty_chosen", put(chosen="\u00a0\t"), [BAD]),
    "empty rejected": ("empty_rejected", put(rejected="  "), [BAD]),
    "identical": ("identical", put(chosen="The same here.", rejected=" The same here.\n"), [BAD]),
    "contradiction": ("contradiction", turned, [BAD, 8]),
    "contradiction as text and as chat": ("contradiction", turned_as_chat, [BAD, 8]),
    "duplicate": ("duplicate", lambda f: copy_of(f, 3), [BAD]),
    "leakage": ("leakage", put(prompt="  what DO you know about\nthe rivers of town number 0?"), [BAD]),
    "own special token": ("special_tokens", put(rejected="Then <|mine|> is not text, is it?"), [BAD]),
    "template token": ("template_tokens", put(chosen="It is all well.<|eot_id|> Is it not so?"), [BAD]),
    "non-ascii template token": ("template_tokens", put(prompt="Is <｜end▁of▁sentence｜> a word?"), [BAD]),
    "NUL": ("control_characters", put(chosen="It is \x00 and that is all there is to it."), [BAD]),
    "C1": ("control_characters", put(rejected="It is \x85 and that is all there is to it."), [BAD]),
    "NUL in prompt": ("control_characters", put(prompt="What is \x00 to you?"), [BAD]),
    "replacement character": ("control_characters", put(prompt="What is caf\ufffd to you?"), [BAD]),
    "lone surrogate": ("control_characters", put(prompt="What is \ud83d to you?"), [BAD]),
    "prompt in the answer": (
        "prompt_repeated",
        put(chosen="What do you know about the clocks of town number 7? Not a lot."),
        [BAD],
    ),
    "over long": ("over_long", put(rejected="It is far. " * 30), [BAD]),
    "equal when cut": (
        "identical_after_truncation over_long",
        put(chosen="It is far. " * 30 + "A", rejected="It is far. " * 30 + "B"),
        [BAD],
    ),
}


def clean_unpaired(rows: int = 40, chat: bool = False) -> pd.DataFrame:
    """Distinct completions; every other one is desirable."""
    said = "There is a lot to say about that, and it is well worth the time: number {}."
    return clean_prompts(rows, chat).assign(
        completion=[said.format(i) for i in range(rows)], label=[i % 2 == 0 for i in range(rows)], ended=True
    )


def other_label(frame: pd.DataFrame) -> pd.DataFrame:
    """Row 7 becomes row 8 with the other label; both stay in the train split."""
    return copy_of(frame, 8, label=not frame.loc[8, "label"])


UNPAIRED_BREAKS: dict[str, tuple[str, Callable[[pd.DataFrame], pd.DataFrame], list[int]]] = {
    "no label, as the reader leaves it": (
        "fault",
        put(fault="label is missing", prompt="", completion=""),
        [BAD],
    ),
    "a bool for text": ("type", put(completion=True), [BAD]),
    "null for text": ("type", put(completion=None), [BAD]),
    "empty completion": ("empty_completion", put(completion=""), [BAD]),
    "both labels": ("contradiction", other_label, [BAD, 8]),
    "own special token": ("special_tokens", put(completion="Then <|mine|> is not text, is it?"), [BAD]),
    "prompt in the answer": (
        "prompt_repeated",
        put(completion="What do you know about the clocks of town number 7? Not a lot."),
        [BAD],
    ),
    "over long": ("over_long", put(completion="It is far. " * 30), [BAD]),
}


TOKENS: dict[str, Any] = {
    "tokens": PlainTokens(words),
    "max_length": 160,
    "max_prompt_length": 60,
    "special_tokens": ["<|mine|>", "!"],
}


@pytest.mark.parametrize(("subject", "clean"), [("pairs", clean_pairs), ("unpaired", clean_unpaired)])
def test_a_clean_frame_passes(gate: Gate, subject: str, clean: Any) -> None:
    first, kept = gate(clean(), subject=subject, **TOKENS)
    report, _ = gate(clean(), subject=subject, baseline=first.profile.model_dump(), **TOKENS)
    assert not report.refused
    assert not failed(report)
    assert kept.equals(clean())
    judged = {f.rule for f in report.findings if not f.skipped}
    assert judged == {f"{subject}/schema", *(f"{subject}/{name}" for name in rules_of(subject))}


CASES = [("pairs", case) for case in PAIR_BREAKS] + [("unpaired", case) for case in UNPAIRED_BREAKS]


@pytest.mark.parametrize(("subject", "case"), CASES)
def test_a_broken_row_is_found(gate: Gate, subject: str, case: str) -> None:
    breaks, clean = (PAIR_BREAKS, clean_pairs) if subject == "pairs" else (UNPAIRED_BREAKS, clean_unpaired)
    rules, break_it, rows = breaks[case]
    report, _ = gate(break_it(clean()), subject=subject, config=STRICT, **TOKENS)
    assert report.refused
    assert set(failed(report)) == set(rules.split())
    for finding in failed(report).values():
        assert finding.rows == [row_number(i) for i in rows]
        assert finding.count == len(rows)
        assert finding.rate == pytest.approx(len(rows) / 40)
        assert finding.severity == "critical"
        assert finding.remedy
        assert finding.remedy in finding.message


CHAT_BREAKS = {
    "no message": ("empty_prompt", []),
    "blank message": ("empty_prompt", [{"role": "user", "content": " \n\t "}]),
    "escaped NUL": ("control_characters", [{"role": "user", "content": "What is \x00 to you?"}]),
    "escaped replacement": ("control_characters", [{"role": "user", "content": "Is it \ufffd to you?"}]),
    "last message repeated": (
        "prompt_repeated",
        [
            {"role": "user", "content": "Hello there, you."},
            {"role": "assistant", "content": 'Say "that".'},
            {"role": "user", "content": "I do not know what to say"},
        ],
    ),
    "leakage": (
        "leakage",
        [{"role": "user", "content": "What do you  know about the\nRIVERS of town number 0?"}],
    ),
}


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize("case", CHAT_BREAKS)
def test_a_broken_chat_prompt_is_found(gate: Gate, case: str, ascii_only: bool) -> None:
    rule, turns = CHAT_BREAKS[case]
    frame = clean_pairs(chat=True)
    frame.loc[BAD, "prompt"] = json.dumps(turns, ensure_ascii=ascii_only, separators=(",", ":"))
    frame.loc[BAD, "chosen"] = "I do not know what to say about that, but it may be so."
    report, _ = gate(frame, config=STRICT)
    assert {name: f.rows for name, f in failed(report).items()} == {rule: [row_number(BAD)]}


def test_text_about_control_characters_is_not_one(gate: Gate) -> None:
    frame = clean_pairs(chat=True)
    turns = [{"role": "user", "content": 'Why is "\\u0000" or C:\\bin in a file, and "content":" too?'}]
    frame.loc[BAD, "prompt"] = json.dumps(turns, separators=(",", ":"))
    assert not failed(gate(frame, config=STRICT)[0])


@pytest.mark.parametrize(
    "case", ["unknown split", "empty prompt", "leakage", "duplicate", "replacement character"]
)
def test_a_broken_prompt_is_found(gate: Gate, case: str) -> None:
    rule, break_it, rows = PAIR_BREAKS[case]
    report, _ = gate(break_it(clean_prompts()), subject="prompts", config=STRICT)
    assert {name: f.rows for name, f in failed(report).items()} == {rule: [row_number(i) for i in rows]}
    assert report.refused


def test_an_over_long_prompt_is_found(gate: Gate) -> None:
    frame = put(prompt="What is it? " * 20)(clean_prompts())
    report, _ = gate(
        frame,
        subject="prompts",
        config=STRICT,
        tokens=PlainTokens(words),
        max_length=400,
        max_prompt_length=90,
    )
    assert {name: f.rows for name, f in failed(report).items()} == {"over_long": [row_number(BAD)]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.drop(columns=["rejected", "split"]), "missing: split, rejected"),
        (lambda f: f.assign(agreement="high"), "column agreement is str, not number"),
        (lambda f: f.assign(chat=0), "column chat is integer, not bool"),
        (lambda f: f.assign(row=f["row"] + 0.5), "column row is number, not integer"),
        (lambda f: f.assign(chosen=1), "column chosen is integer, not text"),
    ],
)
@pytest.mark.parametrize("quarantine", ["refuse", "drop"])
def test_a_wrong_schema_is_refused(gate: Gate, change: Any, says: str, quarantine: str) -> None:
    report, _ = gate(change(clean_pairs()), config=GateConfig(quarantine=quarantine))
    assert report.refused
    assert says in failed(report)["schema"].message


def test_too_few_rows(gate: Gate) -> None:
    report, _ = gate(clean_pairs(19))
    assert failed(report)["too_few"].observed == 19
    assert not report.refused  # a small set of one's own is a warning
    assert not failed(gate(clean_pairs(20))[0])
    strict = GateConfig.model_validate({"too_few": {"severity": "critical"}})
    assert gate(clean_pairs(19), config=strict)[0].refused


def test_no_rows_at_all(gate: Gate) -> None:
    report, kept = gate(clean_pairs().iloc[:0], config=GateConfig(quarantine="drop"))
    assert set(failed(report)) == {"too_few"}
    assert len(kept) == 0


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_length_skew_and_ratio(gate: Gate, longer: str) -> None:
    frame = clean_pairs()
    frame[longer] = frame[longer] + " And there is more to say than that." * 3
    found = failed(gate(frame)[0])
    assert set(found) == {"length_skew", "length_ratio"}
    assert found["length_skew"].observed == (1.0 if longer == "chosen" else 0.0)
    assert (found["length_ratio"].observed or 0) * (1 if longer == "chosen" else -1) > 0.5


def test_script_and_language_drift(gate: Gate) -> None:
    baseline = gate(clean_pairs())[0].profile.model_dump()
    french = "Je ne sais pas ce que vous en pensez, mais c'est la vie que nous avons avec le numéro {}."
    frame = clean_pairs()
    frame.loc[:19, "chosen"] = [french.format(i) for i in range(20)]
    frame.loc[:19, "rejected"] = [french.format(i)[:-9] + "ça." for i in range(20)]
    found = failed(gate(frame, baseline=baseline)[0])
    assert set(found) == {"language_drift"}
    assert found["language_drift"].observed == pytest.approx(0.5)
    frame.loc[:19, ["chosen", "rejected"]] = [["Я не знаю, что сказать об этом.", "Мне нечего сказать."]] * 20
    found = failed(gate(frame, baseline=baseline)[0])
    assert "script_drift" in found
    assert found["script_drift"].severity == "warning"


def test_without_a_baseline_drift_is_skipped_and_the_profile_given(gate: Gate) -> None:
    report, _ = gate(clean_pairs())
    skipped = {f.rule for f in report.findings if f.skipped}
    assert {"pairs/script_drift", "pairs/language_drift"} <= skipped
    assert report.profile.scripts == {"Latin": 1.0}
    assert report.profile.languages == {"en": 1.0}
    assert Profile.model_validate_json(report.profile.model_dump_json()) == report.profile


def test_nothing_is_written_beside_the_docs(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    gate(clean_pairs())
    assert not list(home.iterdir())
    assert {p.name for p in tmp_path.iterdir()} == {"home", "docs"}


# --- unpaired rows ----------------------------------------------------------------------------------------


def test_the_refusal_speaks_of_labels(gate: Gate) -> None:
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


def test_real_kto_rows_pass(gate: Gate, shared: Any) -> None:
    path = shared / "data" / "preference" / "llamafactory_kto_en_demo.json.gz"
    frame = split_by_prompt(load(DataConfig(path=str(path))).frame, 0.1, 0)
    report, kept = gate(frame, subject="unpaired")
    assert not report.refused, failed(report)
    assert len(kept) == 300
    balance = next(f for f in report.findings if f.rule == "unpaired/label_balance")
    assert balance.observed == 0.5
