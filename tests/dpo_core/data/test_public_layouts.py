"""Rows of public preference data sets: chosen answer, prompt, ties, margins."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_core.data.config import DataConfig
from dpo_core.data.formats import ADAPTERS, recognise
from dpo_core.data.layouts.fields import Fault, PairFields, Ranked
from dpo_core.data.layouts.rankings import pairs_of
from dpo_core.data.load import load
from dpo_core.data.records import Loaded
from dpo_core.errors import DataError

USER = {"role": "user", "content": "Hi"}


def _lines(path: Path, rows: list[dict], **settings: object) -> Loaded:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load(DataConfig(path=str(path), **settings))  # type: ignore[arg-type]


def _said(answer: str) -> dict:
    return {"role": "assistant", "content": answer}


def _chat(*turns: dict) -> str:
    return json.dumps(list(turns), separators=(",", ":"))


def _rated(text: str, fine: float | None, overall: float) -> dict:
    return {
        "model": "m",
        "response": text,
        "fine-grained_score": fine,
        "overall_score": overall,
        "critique": "",
    }


ULTRA = {"source": "evol", "instruction": "Hi", "models": ["a", "b", "c"],
         "completions": [_rated("x", 2.0, 10), _rated("y", 4.5, 1), _rated("z", 3.0, 5)],
         "correct_answers": ["None"]}  # fmt: skip
STEER2 = {"split": "train", "prompt": "Hi", "response_1": "x", "response_2": "y", "preference_strength": 2,
          "preference_statement": "s", "preference_elaboration": "e"}  # fmt: skip
STEER3 = {"domain": "code", "language": "c", "context": [USER], "response1": "x", "response2": "y",
          "overall_preference": -3, "individual_preference": [{"score": -3, "reasoning": "r"}]}  # fmt: skip
SHP = {"post_id": "p", "domain": "askbaking_train", "history": "Hi", "human_ref_A": "x", "human_ref_B": "y",
       "labels": 0, "score_A": 2, "score_B": 7, "score_ratio": 3.5, "seconds_difference": 1.0}  # fmt: skip
PKU = {"prompt": "Hi", "response_0": "x", "response_1": "y", "better_response_id": 0, "safer_response_id": 1,
       "is_response_0_safe": False, "is_response_1_safe": True}  # fmt: skip
TLDR = {"info": {"id": "i", "post": "I fell.", "title": "Ouch", "subreddit": "tifu", "article": None},
        "summaries": [{"text": " x", "policy": "ref", "note": None}, {"text": " y", "policy": "sup4"}],
        "choice": 1, "worker": "w", "batch": "b", "split": "train", "extra": {"confidence": 7}}  # fmt: skip
NEWS = {**TLDR, "info": {"id": "i", "post": None, "title": None, "site": "cnn", "article": "It rained."}}
WEBGPT = {"question": {"dataset": "eli5", "id": "i", "full_text": "Hi"}, "answer_0": "x", "answer_1": "y",
          "score_0": -0.5, "score_1": 0.5, "quotes_0": {"title": ["t"]}}  # fmt: skip
ARENA = {"question_id": "q", "model_a": "m", "model_b": "n", "winner": "model_b", "judge": "arena_user_1",
         "conversation_a": [USER, _said("x")], "conversation_b": [USER, _said("y")], "turn": 1,
         "language": "English", "toxic_chat_tag": {"roberta": {"flagged": False}}}  # fmt: skip
KAGGLE = {"id": 1, "model_a": "m", "model_b": "n", "prompt": '["Hi"]', "response_a": '["x"]',
          "response_b": '["y"]', "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}  # fmt: skip
CHAT = _chat(USER)

PAIRS: dict[str, tuple[str, dict, PairFields]] = {
    "helpsteer2": ("helpsteer2", STEER2, PairFields("Hi", False, "y", "x", margin=2.0)),
    "helpsteer2, the first": (
        "helpsteer2", {**STEER2, "preference_strength": -1}, PairFields("Hi", False, "x", "y", margin=1.0),
    ),
    "helpsteer2 of several turns": (
        "helpsteer2",
        {**STEER2, "prompt": "Hi\n<extra_id_1>Assistant\nYes?\n<extra_id_1>User\nWhy?"},
        PairFields(
            _chat(USER, _said("Yes?"), {"role": "user", "content": "Why?"}), True, "y", "x", margin=2.0,
        ),
    ),
    "helpsteer3": ("helpsteer3", STEER3, PairFields(CHAT, True, "x", "y", margin=3.0)),
    "shp": ("shp", SHP, PairFields("Hi", False, "y", "x", margin=5.0)),
    "shp, A": ("shp", {**SHP, "labels": 1, "score_A": 9}, PairFields("Hi", False, "x", "y", margin=2.0)),
    "pku": ("pku-saferlhf", PKU, PairFields("Hi", False, "x", "y")),
    "tldr": (
        "summaries",
        TLDR,
        PairFields("SUBREDDIT: r/tifu\n\nTITLE: Ouch\n\nPOST: I fell.\n\nTL;DR:", False, " y", " x"),
    ),
    "tldr of an article": ("summaries", NEWS, PairFields("It rained.\n\nTL;DR:", False, " y", " x")),
    "webgpt": ("webgpt", WEBGPT, PairFields("Hi", False, "y", "x", margin=1.0)),
    "arena": ("arena", ARENA, PairFields(CHAT, True, "y", "x")),
    "arena of kaggle": ("arena", KAGGLE, PairFields(CHAT, True, "x", "y")),
    "ultrafeedback binarized": (
        "prompt-pairs",
        {"prompt": "Hi", "prompt_id": "i", "chosen": [USER, _said("x")], "rejected": [USER, _said("y")],
         "messages": [USER, _said("x")], "score_chosen": 8.5, "score_rejected": 6.0},
        PairFields(CHAT, True, "x", "y", margin=2.5),
    ),
    "ultrafeedback cleaned": (
        "prompt-pairs",
        {"source": "s", "prompt": "Hi", "chosen": [USER, _said("x")], "chosen-rating": 4.25,
         "rejected": [USER, _said("y")], "rejected-rating": 2.0, "rejected-model": "n"},
        PairFields(CHAT, True, "x", "y", margin=2.25),
    ),
    "math-step-dpo": (
        "prompt-pairs",
        {"dataset": "d", "prompt": "1+1+1?", "initial_reason_steps": "Step 1: 1+1=2.\nStep 2:",
         "chosen": " 3", "rejected": " 4", "full_chosen": "x", "full_rejected": "y", "answer": "3"},
        PairFields("1+1+1?\n\nStep 1: 1+1=2.\nStep 2:", False, " 3", " 4"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRS)
def test_rows_of_public_sets(case: str) -> None:
    name, row, pair = PAIRS[case]
    assert recognise([row])[0] == name
    assert ADAPTERS[name].convert(row) == pair  # type: ignore[index]


TIES = {
    "helpsteer2": {**STEER2, "preference_strength": 0},
    "helpsteer3": {**STEER3, "overall_preference": 0},
    "webgpt": {**WEBGPT, "score_0": 0.5},
    "arena": {**ARENA, "winner": "tie (bothbad)"},
}


@pytest.mark.parametrize("name", TIES)
def test_ties_are_dropped(name: str) -> None:
    assert recognise([TIES[name]])[0] == name
    assert ADAPTERS[name].convert(TIES[name]) is None  # type: ignore[index]
    assert ADAPTERS["arena"].convert({**KAGGLE, "winner_model_a": 0, "winner_tie": 1}) is None


def test_arena_answers_of_several_turns() -> None:
    more = {"role": "user", "content": "And?"}
    a, b = [USER, _said("x"), more, _said("xx")], [USER, _said("y"), more, _said("yy")]
    row = {**ARENA, "conversation_a": a, "conversation_b": b, "turn": 2, "judge": None}
    pair = ADAPTERS["arena"].convert(row)
    assert (pair.prompt, pair.answer_chat) == (CHAT, True)
    assert (json.loads(pair.chosen), json.loads(pair.rejected)) == (b[1:], a[1:])
    # MT-bench judges the turn that it names, and what came after says nothing.
    first = ADAPTERS["arena"].convert({**row, "turn": 1, "judge": "expert_0"})
    assert first == PairFields(CHAT, True, "y", "x")


def test_the_safer_response_is_an_option(tmp_path: Path) -> None:
    better = _lines(tmp_path / "x.jsonl", [PKU])
    assert (better.format, better.frame["chosen"][0]) == ("pku-saferlhf", "x")
    assert "data.format=pku-saferlhf-safer" in better.remarks[0]
    safer = _lines(tmp_path / "x.jsonl", [PKU], format="pku-saferlhf-safer")
    assert safer.frame["chosen"][0] == "y"


@pytest.mark.parametrize(
    ("name", "row", "why"),
    [
        ("pku-saferlhf", {**PKU, "better_response_id": 2}, "better_response_id is 2, neither 0 nor 1"),
        ("shp", {**SHP, "labels": None}, "labels is missing"),
        ("helpsteer2", {**STEER2, "preference_strength": "high"}, "preference_strength is 'high', not a"),
        ("arena", {**ARENA, "winner": "model_c"}, "winner is 'model_c', neither model_a, model_b nor tie"),
        ("summaries", {**TLDR, "summaries": TLDR["summaries"][:1]}, "summaries holds 1 summaries"),  # type: ignore[index]
        ("webgpt", {**WEBGPT, "score_1": None}, "score_1 is missing"),
        ("ranked", {"prompt": "p", "answers": [{"text": "a", "score": None}]}, "answers holds no scores"),
    ],
)  # fmt: skip
def test_rows_without_a_verdict_say_so(name: Any, row: dict, why: str) -> None:
    with pytest.raises(Fault) as caught:
        ADAPTERS[name].convert(row)
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "pairs"),
    [
        ("best_worst", [("y", "x", 2.5)]),
        ("adjacent", [("y", "z", 1.5), ("z", "x", 1.0)]),
        ("all", [("y", "z", 1.5), ("y", "x", 2.5), ("z", "x", 1.0)]),
    ],
)
def test_pairs_of_ultrafeedback(tmp_path: Path, mode: str, pairs: list) -> None:
    loaded = _lines(tmp_path / "x.jsonl", [ULTRA], pairs=mode)
    assert loaded.format == "ranked"
    assert list(loaded.frame[["chosen", "rejected", "margin"]].itertuples(index=False, name=None)) == pairs
    assert set(loaded.frame["row"]) == {1}
    assert loaded.frame["id"].is_unique


def test_a_prompt_without_answers_is_counted(tmp_path: Path) -> None:
    loaded = _lines(tmp_path / "x.jsonl", [ULTRA, {**ULTRA, "completions": []}])
    assert (len(loaded.frame), loaded.notes["single_answers"], loaded.notes["faults"]) == (1, 1, 0)


def test_equal_scores_make_no_pair() -> None:
    ranked = Ranked("p", False, "", [("a", 1.0, 1), ("b", 2.0, 2), ("c", 1.0, 3), ("d", 2.0, 4)])
    found = {
        m: [(p.chosen, p.rejected) for p, _ in pairs_of(ranked, m)] for m in ("best_worst", "adjacent", "all")
    }
    assert found == {
        "best_worst": [("b", "c")],
        "adjacent": [("d", "a")],
        "all": [("b", "a"), ("b", "c"), ("d", "a"), ("d", "c")],
    }


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Hi", "qid": 1, "answers": [{"text": "x", "pm_score": 1}, {"text": "y", "pm_score": 5}]},
        {"prompt": [USER], "responses": ["x", "y"], "rewards": [0.1, 0.9]},
        {"instruction": "Hi", "generations": ["x", "y"], "ratings": [1, 2]},
        {"prompt": "Hi", "answers": {"answer": ["x", "y"], "rank": [2, 1]}},
        {"prompt": "Hi", "answers": json.dumps([{"answer": "x", "rank": 2}, {"answer": "y", "rank": 1}])},
    ],
)
def test_lists_of_other_names(tmp_path: Path, row: dict) -> None:
    loaded = _lines(tmp_path / "x.jsonl", [row])
    assert (loaded.format, loaded.notes["faults"]) == ("ranked", 0)
    assert list(loaded.frame.loc[0, ["chosen", "rejected"]]) == ["y", "x"]


def test_one_answer_a_row(tmp_path: Path) -> None:
    """HelpSteer2's ratings: rows of a prompt need not follow each other; ties are counted."""
    scores = {"correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 1}
    answers = [("p", "a", 1), ("q", "b", 2), ("p", "c", 4), ("q", "d", 2), ("r", "e", 3), ("p", "f", 2)]
    rows = [{"prompt": p, "response": a, "helpfulness": s, **scores} for p, a, s in answers]
    loaded = _lines(tmp_path / "x.jsonl", rows)
    assert (loaded.format, loaded.notes["ties_dropped"], loaded.notes["single_answers"]) == ("scored", 1, 1)
    columns = ["row", "prompt", "chosen", "rejected", "margin"]
    assert list(loaded.frame[columns].itertuples(index=False, name=None)) == [(3, "p", "c", "a", 3.0)]
    assert len(_lines(tmp_path / "x.jsonl", rows, pairs="all").frame) == 3


TREE = [
    ("r", None, "prompter", "Hi", None),
    ("a0", "r", "assistant", "good", 0),
    ("a1", "r", "assistant", "bad", 1),
    ("u", "a0", "prompter", "Why?", None),
    ("b0", "u", "assistant", "so", 1),
    ("b1", "u", "assistant", "because", 0),
    ("b2", "u", "assistant", "unranked", None),
]


def _flat() -> list[dict]:
    names = ("message_id", "parent_id", "role", "text", "rank")
    return [
        dict(zip(names, message, strict=True)) | {"lang": "en", "message_tree_id": "r"} for message in TREE
    ]


def _nested(name: str) -> dict:
    at = next(message for message in _flat() if message["message_id"] == name)
    children = [message["message_id"] for message in _flat() if message["parent_id"] == name]
    return {k: v for k, v in at.items() if k != "parent_id"} | {"replies": [_nested(c) for c in children]}


@pytest.mark.parametrize("form", ["flat", "nested", "flat, turned round"])
def test_trees(tmp_path: Path, form: str) -> None:
    rows = [{"message_tree_id": "r", "prompt": _nested("r")}] if form == "nested" else _flat()
    loaded = _lines(tmp_path / "x.jsonl", rows[::-1] if "turned" in form else rows)
    assert (loaded.format, loaded.notes["faults"]) == ("oasst", 0)
    found = {row["prompt"]: (row["chosen"], row["rejected"]) for row in loaded.frame.to_dict("records")}
    assert found == {
        CHAT: ("good", "bad"),
        _chat(USER, _said("good"), {"role": "user", "content": "Why?"}): ("because", "so"),
    }


def test_a_tree_with_a_cycle_or_without_its_root(tmp_path: Path) -> None:
    rows = _flat()
    rows[0]["parent_id"] = "a0"
    with pytest.raises(DataError, match="no prompt has two answers"):
        _lines(tmp_path / "x.jsonl", rows)
    rows = [*_flat(), {**_flat()[1], "message_id": "x", "parent_id": "nowhere"}]
    assert _lines(tmp_path / "x.jsonl", rows).remarks == [
        "ranked replies whose earlier messages are not in the data were left out (1 rows)"
    ]


def test_pairs_of_rankings_are_asked_of_rankings_alone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.pairs has no effect"):
        _lines(tmp_path / "x.jsonl", [PKU], pairs="all")


def test_scores_that_contradict_the_choice_are_said(tmp_path: Path) -> None:
    row = {"prompt": "Hi", "chosen": "x", "rejected": "y", "score_chosen": 1, "score_rejected": 3}
    loaded = _lines(tmp_path / "x.jsonl", [row, {**row, "margin": 2.0}])
    assert list(loaded.frame["margin"]) == [-2.0, 2.0]
    assert loaded.remarks == ["the chosen answer has the lower score (1 rows)"]
