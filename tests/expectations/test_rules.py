"""Every rule broken on purpose in a row of a clean frame: it and nothing else must fail, naming the row."""

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
from expectations.gate import judge
from expectations.rules import rules_of
from tests.support.frames import PlainTokens, clean_pairs, clean_prompts, failed, row_number

Gate = Callable[..., Any]
Change = Callable[[pd.DataFrame, int], None]


def words(text: str) -> list[int]:
    """A lossless toy tokenizer: one token a character."""
    return [ord(c) for c in text]


TOKENS: dict[str, Any] = {
    "tokens": PlainTokens(words),
    "max_length": 160,
    "max_prompt_length": 60,
    "special_tokens": ["<|mine|>", "!"],
}

# Without tolerance each broken row must show, and the rules that are warnings by default must refuse.
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


CLEAN = {"pairs": clean_pairs, "unpaired": clean_unpaired, "prompts": clean_prompts}


def put(**values: Any) -> Change:
    """Set values of the row."""

    def change(frame: pd.DataFrame, at: int) -> None:
        for name, value in values.items():
            frame[name] = frame[name].astype(object)  # str columns take no other values, and no surrogates
            frame.at[at, name] = value

    return change


def copy(**changes: Callable[[pd.Series], Any]) -> Change:
    """The next row becomes a copy of the row with changes; id, row and split stay its own."""

    def change(frame: pd.DataFrame, at: int) -> None:
        for name in frame.columns.difference(["id", "row", "split"]):
            frame[name] = frame[name].astype(object) if name == "prompt" else frame[name]
            frame.at[at + 1, name] = changes.get(name, lambda row, name=name: row[name])(frame.loc[at])

    return change


def as_turns(row: pd.Series) -> str:
    """The row's prompt as a conversation of one turn."""
    return json.dumps([{"role": "user", "content": row["prompt"]}], separators=(",", ":"))


TURNED = {"chosen": lambda row: row["rejected"], "rejected": lambda row: row["chosen"]}
LEAK = put(prompt="  what DO you know about\nthe rivers of town number 0?")  # that row is in the eval split


def begin_with_prompt(column: str) -> Change:
    def change(frame: pd.DataFrame, at: int) -> None:
        frame.at[at, column] = f"{frame.at[at, 'prompt']} Not a lot."

    return change


# The rules that are broken, how, and the places of the rows that break them: 0 is the row, 1 the next.
COMMON: list[tuple[str, Change, tuple[int, ...]]] = [
    ("split", put(split="test"), (0,)),
    ("empty_prompt", put(prompt=" \n"), (0,)),
    ("duplicate", copy(), (1,)),
    ("leakage", LEAK, (0,)),
    ("template_tokens", put(prompt="Is <｜end▁of▁sentence｜> a word?"), (0,)),
    ("control_characters", put(prompt="What is \x00 to you?"), (0,)),
    ("control_characters", put(prompt="What is caf\ufffd to you?"), (0,)),
    ("control_characters", put(prompt="What is \ud83d to you?"), (0,)),
]
BREAKS: dict[str, list[tuple[str, Change, tuple[int, ...]]]] = {
    "prompts": [*COMMON, ("over_long", put(prompt="What is it? " * 20), (0,))],
    "pairs": [
        *COMMON,
        ("fault", put(fault="field rejected is missing", prompt="", chosen="", rejected=""), (0,)),
        ("type", put(chosen=True), (0,)),
        ("type", put(rejected=None), (0,)),
        ("empty_chosen", put(chosen=""), (0,)),
        ("empty_chosen", put(chosen="\u00a0\t"), (0,)),
        ("empty_rejected", put(rejected="  "), (0,)),
        ("identical", put(chosen="The same here.", rejected=" The same here.\n"), (0,)),
        ("contradiction", copy(**TURNED), (0, 1)),
        ("contradiction", copy(**TURNED, prompt=as_turns, chat=lambda _: True), (0, 1)),
        ("special_tokens", put(rejected="Then <|mine|> is not text, is it?"), (0,)),
        ("template_tokens", put(chosen="It is all well.<|eot_id|> Is it not so?"), (0,)),
        ("control_characters", put(chosen="It is \x00 and that is all there is to it."), (0,)),
        ("control_characters", put(rejected="It is \x85 and that is all there is to it."), (0,)),
        ("prompt_repeated", begin_with_prompt("chosen"), (0,)),
        ("over_long", put(rejected="It is far. " * 30), (0,)),
        (
            "identical_after_truncation over_long",
            put(chosen="It is far. " * 30 + "A", rejected="It is far. " * 30 + "B"),
            (0,),
        ),
    ],
    "unpaired": [
        *COMMON,
        ("fault", put(fault="label is missing", prompt="", completion=""), (0,)),
        ("type", put(completion=True), (0,)),
        ("type", put(completion=None), (0,)),
        ("empty_completion", put(completion="\u00a0\t"), (0,)),
        ("contradiction", copy(label=lambda row: not row["label"]), (0, 1)),
        ("special_tokens", put(completion="Then <|mine|> is not text, is it?"), (0,)),
        ("prompt_repeated", begin_with_prompt("completion"), (0,)),
        ("over_long", put(completion="It is far. " * 30), (0,)),
    ],
}


@pytest.mark.parametrize("subject", ["pairs", "unpaired"])
def test_a_clean_frame_passes(gate: Gate, subject: str) -> None:
    clean = CLEAN[subject]
    first, kept = gate(clean(), subject=subject, **TOKENS)
    report, _ = gate(clean(), subject=subject, baseline=first.profile.model_dump(), **TOKENS)
    assert not report.refused
    assert not failed(report)
    assert kept.equals(clean())
    judged = {f.rule for f in report.findings if not f.skipped}
    assert judged == {f"{subject}/schema", *(f"{subject}/{name}" for name in rules_of(subject))}


@pytest.mark.parametrize("subject", BREAKS)
def test_every_broken_row_is_found(gate: Gate, subject: str) -> None:
    rows = 5 * len(BREAKS[subject]) + 5
    frame = CLEAN[subject](rows)
    broken: dict[str, list[int]] = {}
    for case, (rules, change, places) in enumerate(BREAKS[subject], 1):
        at = 5 * case + 1  # in the train split, as the next one
        change(frame, at)
        for rule in rules.split():
            broken.setdefault(rule, []).extend(row_number(at + place) for place in places)
    report, _ = gate(frame, subject=subject, config=STRICT, **TOKENS)
    assert report.refused
    found = failed(report)
    assert {name: f.rows for name, f in found.items()} == broken
    for finding in found.values():
        assert finding.count == len(finding.rows)
        assert finding.rate == pytest.approx(finding.count / rows)
        assert finding.severity == "critical"
        assert finding.remedy
        assert finding.remedy in finding.message


CHAT_BREAKS: list[tuple[str | None, list[dict[str, str]]]] = [
    ("empty_prompt", []),
    ("empty_prompt", [{"role": "user", "content": " \n\t "}]),
    ("control_characters", [{"role": "user", "content": "What is \x00 to you?"}]),
    ("control_characters", [{"role": "user", "content": "Is it \ufffd to you?"}]),
    (
        "prompt_repeated",
        [
            {"role": "user", "content": "Hello there, you."},
            {"role": "assistant", "content": 'Say "that".'},
            {"role": "user", "content": "I do not know what to say"},
        ],
    ),
    ("leakage", [{"role": "user", "content": "What do you  know about the\nRIVERS of town number 0?"}]),
    # A text about control characters holds none.
    (None, [{"role": "user", "content": 'Why is "\\u0000" or C:\\bin in a file, and "content":" too?'}]),
]


@pytest.mark.parametrize("ascii_only", [False, True])
def test_every_broken_chat_prompt_is_found(gate: Gate, ascii_only: bool) -> None:
    frame = clean_pairs(chat=True)
    broken: dict[str, list[int]] = {}
    for case, (rule, turns) in enumerate(CHAT_BREAKS):
        at = 5 * case + 1
        frame.at[at, "prompt"] = json.dumps(turns, ensure_ascii=ascii_only, separators=(",", ":"))
        frame.at[at, "chosen"] = "I do not know what to say about that, but it may be so."
        if rule:
            broken.setdefault(rule, []).append(row_number(at))
    report, _ = gate(frame, config=STRICT)
    assert {name: f.rows for name, f in failed(report).items()} == broken


def test_a_wrong_schema_is_refused(gate: Gate) -> None:
    frame = clean_pairs().assign(agreement="high", chat=0, chosen=1).drop(columns=["rejected", "split"])
    report, _ = gate(frame.assign(row=frame["row"] + 0.5), config=GateConfig(quarantine="drop"))
    assert report.refused
    for says in (
        "missing: split, rejected",
        "column agreement is str, not number",
        "column chat is integer, not bool",
        "column row is number, not integer",
        "column chosen is integer, not text",
    ):
        assert says in failed(report)["schema"].message


def test_too_few_rows(gate: Gate) -> None:
    report, _ = gate(clean_pairs(19))
    assert failed(report)["too_few"].observed == 19
    assert not report.refused  # a small set of one's own is a warning
    assert not failed(gate(clean_pairs(20))[0])


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
    assert failed(gate(frame, baseline=baseline)[0])["script_drift"].severity == "warning"


def test_without_a_baseline_drift_is_skipped_and_the_profile_given(gate: Gate) -> None:
    report, _ = gate(clean_pairs())
    skipped = {f.rule for f in report.findings if f.skipped}
    assert {"pairs/script_drift", "pairs/language_drift"} <= skipped
    assert report.profile.scripts == {"Latin": 1.0}
    assert report.profile.languages == {"en": 1.0}
    assert Profile.model_validate_json(report.profile.model_dump_json()) == report.profile


def test_nothing_is_written_beside_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    judge(clean_pairs(), subject="pairs", config=GateConfig(), docs_dir=tmp_path / "docs")
    assert not list(home.iterdir())
    assert {p.name for p in tmp_path.iterdir()} == {"home", "docs"}


# --- unpaired rows ----------------------------------------------------------------------------------------


def with_other_label() -> pd.DataFrame:
    """Row 7 is row 6 with the other label."""
    frame = clean_unpaired()
    copy(label=lambda row: not row["label"])(frame, 6)
    return frame


def test_the_refusal_speaks_of_labels_and_both_sides_of_a_contradiction_are_dropped(gate: Gate) -> None:
    report, _ = gate(with_other_label(), subject="unpaired")
    with pytest.raises(
        GateRefused, match="refused the unpaired rows: unpaired/contradiction: 2 of 40"
    ) as caught:
        report.raise_if_refused()
    assert "the same answer and the other label" in caught.value.problem
    assert "two answers" not in str(caught.value)
    report, kept = gate(with_other_label(), subject="unpaired", config=GateConfig(quarantine="drop"))
    assert not report.refused
    assert report.dropped_by == {"unpaired/contradiction": 2}
    assert set(kept["row"]) == {row_number(i) for i in range(40)} - {row_number(6), row_number(7)}


def test_the_same_answer_to_another_prompt_is_no_contradiction(gate: Gate) -> None:
    frame = clean_unpaired()
    frame["completion"] = "There is a lot to say about that."
    assert not failed(gate(frame, subject="unpaired", config=STRICT)[0])


def test_a_single_class_is_a_warning(gate: Gate) -> None:
    report, _ = gate(clean_unpaired().assign(label=False), subject="unpaired")
    (finding,) = failed(report).values()
    assert (finding.rule, finding.severity) == ("unpaired/label_balance", "warning")
    assert finding.observed == 0.0
    assert not report.refused


def test_real_kto_rows_pass(gate: Gate, shared: Any) -> None:
    path = shared / "data" / "preference" / "llamafactory_kto_en_demo.json.gz"
    frame = split_by_prompt(load(DataConfig(path=str(path))).frame, 0.1, 0)
    report, kept = gate(frame, subject="unpaired")
    assert not report.refused, failed(report)
    assert len(kept) == 300
    balance = next(f for f in report.findings if f.rule == "unpaired/label_balance")
    assert balance.observed == 0.5
