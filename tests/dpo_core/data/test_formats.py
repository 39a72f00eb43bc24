"""Every adapter on its own rows and on faulty ones; recognition of formats."""

import json
import shlex

import pytest
import yaml

from dpo_core.data.formats import ADAPTERS, recognise
from dpo_core.data.layouts.common import hh, kto, pandalm, prompt_pairs, prompts, sharegpt, stackexchange
from dpo_core.data.layouts.fields import Fault, PairFields, PromptFields, Unpaired
from dpo_core.errors import DataError

USER = {"role": "user", "content": "Hi"}
GOOD, BAD = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
CHAT = '[{"role":"user","content":"Hi"}]'
SYSTEM_CHAT = '[{"role":"system","content":"S"},{"role":"user","content":"Hi"}]'
TURNS = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
VOTES = {"annotator1": 2, "annotator2": 2, "annotator3": 1}
PANDA = {"instruction": "Do", "input": "it", "response1": "x", "response2": "y", **VOTES}

GOOD_ROWS = {
    "hh": (
        "hh",
        {"chosen": TURNS + " yes", "rejected": TURNS + " no"},
        PairFields(TURNS, False, " yes", " no"),
    ),
    "strings": (
        "prompt-pairs",
        {"prompt": "p", "chosen": "c", "rejected": ""},
        PairFields("p", False, "c", ""),
    ),
    "strings that repeat their transcript": (
        "prompt-pairs",
        {"prompt": TURNS, "chosen": TURNS + " yes", "rejected": TURNS + " no"},
        PairFields(TURNS, False, " yes", " no"),
    ),
    "instruction and input": (
        "prompt-pairs",
        {"instruction": "i", "input": "x", "chosen": "c", "rejected": "r"},
        PairFields("i\n\nx", False, "c", "r"),
    ),
    "question and system": (
        "prompt-pairs",
        {"system": "S", "question": "Hi", "chosen": "c", "rejected": "r"},
        PairFields(SYSTEM_CHAT, True, "c", "r"),
    ),
    "messages": (
        "prompt-pairs",
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        PairFields(CHAT, True, "yes", "no"),
    ),
    "messages with implicit prompt": (
        "prompt-pairs",
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        PairFields(CHAT, True, "yes", "no"),
    ),
    "prompt given twice": (
        "prompt-pairs",
        {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        PairFields(CHAT, True, "yes", "no"),
    ),
    "prompt messages and text answers": (
        "prompt-pairs",
        {"prompt": [USER], "chosen": "yes", "rejected": "no"},
        PairFields(CHAT, True, "yes", "no"),
    ),
    "prompt text and one message": (
        "prompt-pairs",
        {"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]},
        PairFields(CHAT, True, "yes", "no"),
    ),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        PairFields(SYSTEM_CHAT, True, "yes", "no"),
    ),
    "sharegpt with a system field": (
        "sharegpt",
        {
            "system": "S",
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        PairFields(SYSTEM_CHAT, True, "yes", "no"),
    ),
    "prompt-pairs with votes": (
        "prompt-pairs",
        {"prompt": "Hi", "chosen": "yes", "rejected": "no", "agreement": 0.75},
        PairFields("Hi", False, "yes", "no", agreement=0.75),
    ),
    "prompt-pairs with votes from csv": (
        "prompt-pairs",
        {"prompt": "Hi", "chosen": "yes", "rejected": "no", "agreement": "1"},
        PairFields("Hi", False, "yes", "no", agreement=1.0),
    ),
    "prompt-pairs with an empty field of votes": (
        "prompt-pairs",
        {"prompt": "Hi", "chosen": "yes", "rejected": "no", "agreement": ""},
        PairFields("Hi", False, "yes", "no"),
    ),
    "pandalm": ("pandalm", PANDA, PairFields("Do\n\nit", False, "y", "x", agreement=2 / 3)),
    "pandalm from csv": (
        "pandalm",
        {**PANDA, "input": "", "annotator1": "1", "annotator2": "1", "annotator3": "1"},
        PairFields("Do", False, "x", "y", agreement=1.0),
    ),
    "stackexchange": (
        "stackexchange",
        {"question": "q", "response_j": "better", "response_k": "worse"},
        PairFields("q", False, "better", "worse"),
    ),
    "kto messages": ("kto", {"messages": [USER, BAD], "label": False}, Unpaired(CHAT, True, "no", False)),
    "kto strings": (
        "kto",
        {"prompt": "p", "completion": "c", "label": True},
        Unpaired("p", False, "c", True),
    ),
    "kto from csv": (
        "kto",
        {"prompt": "p", "completion": "c", "label": "False"},
        Unpaired("p", False, "c", False),
    ),
    "kto prompt and completion messages": (
        "kto",
        {"prompt": [USER], "completion": [GOOD], "label": 1},
        Unpaired(CHAT, True, "yes", True),
    ),
    "prompt": ("prompts", {"prompt": "p", "label": "safe"}, PromptFields("p", False)),
    "prompt messages": ("prompts", {"prompt": [USER]}, PromptFields(CHAT, True)),
    "text": ("prompts", {"text": "t"}, PromptFields("t", False)),
}


@pytest.mark.parametrize("case", GOOD_ROWS)
def test_row_is_recognised_and_converted(case: str) -> None:
    name, row, record = GOOD_ROWS[case]
    recognised, why = recognise([row])
    assert recognised == name
    assert why.startswith(f"1 of the first 1 rows are {name}: ")
    assert ADAPTERS[name].convert(row) == record


def test_hh_loses_no_character() -> None:
    row = {"chosen": TURNS + " yes\n", "rejected": TURNS + ""}
    pair = hh(row)
    assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (row["chosen"], row["rejected"])


def test_chat_prompt_is_compact_and_readable_json() -> None:
    pair = prompt_pairs(
        {"prompt": [{"content": "Größe 日本", "role": "user", "name": None}], "chosen": "a", "rejected": "b"}
    )
    assert pair.prompt == '[{"role":"user","content":"Größe 日本"}]'
    assert json.loads(pair.prompt)[0]["role"] == "user"


BAD_ROWS = {
    "hh parts early": (
        hh,
        {"chosen": TURNS + " x", "rejected": TURNS.replace("b", "d") + " x"},
        "part before",
    ),
    "hh without turns": (hh, {"chosen": "x", "rejected": TURNS}, "chosen has no turn of the Assistant"),
    "hh ends with Human": (hh, {"chosen": TURNS, "rejected": TURNS + " x\n\nHuman: y"}, "rejected ends with"),
    "missing": (prompt_pairs, {"prompt": "p", "chosen": "c"}, "rejected is missing"),
    "null": (prompt_pairs, {"prompt": "p", "chosen": None, "rejected": "r"}, "chosen is missing"),
    "number": (prompt_pairs, {"prompt": "p", "chosen": "c", "rejected": 3}, "rejected is a JSON number"),
    "no prompt": (prompt_pairs, {"chosen": "c", "rejected": "r"}, "prompt is missing"),
    "text and messages": (
        prompt_pairs,
        {"prompt": "p", "chosen": "c", "rejected": [BAD]},
        "chosen is a string",
    ),
    "other conversations": (
        prompt_pairs,
        {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "Ho"}, BAD]},
        "the conversations part",
    ),
    "other prompt text": (
        prompt_pairs,
        {"prompt": "Ho", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        "not among",
    ),
    "other prompt turns": (
        prompt_pairs,
        {"prompt": [{**USER, "content": "Ho"}], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        "not those of prompt",
    ),
    "answer of the user": (
        prompt_pairs,
        {"prompt": "p", "chosen": [USER], "rejected": [BAD]},
        "turn of the user",
    ),
    "no user turn": (prompt_pairs, {"chosen": [GOOD], "rejected": [BAD]}, "no turn of a user"),
    "prompt ends with assistant": (
        kto,
        {"messages": [USER, GOOD, BAD], "label": 1},
        "ends with a turn of the assistant",
    ),
    "content no string": (prompts, {"prompt": [{"role": "user", "content": [1]}]}, "content is not a string"),
    "strange role": (prompts, {"prompt": [{"role": "narrator", "content": "x"}]}, "role is not one of"),
    "message no object": (prompts, {"prompt": ["x"]}, "holds a string"),
    "votes in percent": (
        prompt_pairs,
        {"prompt": "p", "chosen": "a", "rejected": "b", "agreement": 75},
        "agreement is '75', not a share of votes from 0 to 1",
    ),
    "votes in words": (
        prompt_pairs,
        {"prompt": "p", "chosen": "a", "rejected": "b", "agreement": "high"},
        "agreement is 'high'",
    ),
    "two chosen messages": (
        sharegpt,
        {"conversations": [USER], "chosen": [GOOD, GOOD], "rejected": BAD},
        "where it cannot stand",
    ),
    "true as response": (pandalm, {**PANDA, "response2": True}, "response2 is a JSON boolean, not a string"),
    "strange vote": (pandalm, {**PANDA, "annotator3": 5}, "annotator3 is not a vote"),
    "no votes": (pandalm, {"instruction": "i", "response1": "x", "response2": "y"}, "votes are missing"),
    "no answer": (stackexchange, {"question": "q", "response_j": "j"}, "response_k is missing"),
    "no label": (kto, {"messages": [USER, GOOD]}, "label is missing"),
    "strange label": (kto, {"messages": [USER, GOOD], "label": "maybe"}, "neither true nor false"),
    "empty row": (prompts, {}, "text is missing"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_unusable_row_says_why(case: str) -> None:
    adapter, row, why = BAD_ROWS[case]
    with pytest.raises(Fault) as caught:
        adapter(row)  # type: ignore[operator]
    assert why in str(caught.value)


@pytest.mark.parametrize("votes", [(0, 0, 0), (0, 0, 1), (0, 1, 2), (1, 1, 2, 2)])
def test_pandalm_without_a_majority_is_a_tie(votes: tuple[int, ...]) -> None:
    row = {"instruction": "i", "response1": "x", "response2": "y"}
    assert pandalm(row | {f"annotator{n}": vote for n, vote in enumerate(votes)}) is None


AMBIGUOUS = {
    "two kinds of pairs": (
        {"question": "q", "response_j": "j", "response_k": "k", "chosen": "c", "rejected": "r"},
        {"prompt-pairs", "stackexchange"},
    ),
    "paired and unpaired": (
        {"prompt": "p", "chosen": "c", "rejected": "r", "completion": "c", "label": True},
        {"prompt-pairs", "kto"},
    ),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_ambiguous_rows_list_the_candidates(case: str) -> None:
    row, candidates = AMBIGUOUS[case]
    with pytest.raises(DataError, match="several formats") as caught:
        recognise([row])
    assert set(caught.value.remedy.partition(": ")[2].split(", ")) == candidates
    assert "data.format" in caught.value.remedy
    assert all(f"{key} (" in caught.value.problem for key in row)


@pytest.mark.parametrize("row", [{"chosen": "a", "rejected": "b"}, {"question": "q", "answer": 3}, {}])
def test_unknown_rows_list_fields_types_and_formats(row: dict) -> None:
    with pytest.raises(DataError, match="no known format") as caught:
        recognise([row])
    assert all(name in caught.value.remedy for name in ADAPTERS)
    assert "data.format" in caught.value.remedy
    if "answer" in row:
        assert "question (string), answer (number)" in caught.value.problem


def test_unknown_rows_come_with_their_columns_mapped_as_yaml_and_as_an_option() -> None:
    row = {"id": 1, "ask": "q", "it's good: very": "a", "bad": "b"}
    with pytest.raises(DataError, match="no known format") as caught:
        recognise([row])
    columns = {"prompt": "ask", "chosen": "it's good: very", "rejected": "bad"}
    recipe, _, option = caught.value.remedy.partition("\n\n")[2].partition("\n\nor as an option:\n\n")
    assert yaml.safe_load(recipe.partition("\n\n")[2]) == {"data": {"columns": columns}}
    flag, value = shlex.split(option)
    assert (flag, value.partition("=")[0]) == ("--set", "data.columns")
    assert yaml.safe_load(value.partition("=")[2]) == columns


def test_recognition_tolerates_some_bad_rows() -> None:
    good = {"prompt": "p", "chosen": "c", "rejected": "r"}
    name, why = recognise([{"prompt": "p", "chosen": None, "rejected": 3}] * 40 + [good] * 60)
    assert name == "prompt-pairs"
    assert why.startswith("60 of the first 100 rows")
