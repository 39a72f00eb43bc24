"""Small files in layouts that were once read partly, wrongly or not at all, with their expected records."""

import json
from pathlib import Path

import pytest

from dpo_core.data.config import DataConfig
from dpo_core.data.load import load
from dpo_core.data.records import Loaded
from dpo_core.errors import DataError

ASKED = "What do you know about amber number 0?"
GOOD, BAD = (
    "Amber is known for item 0, and there is a bit to say.",
    "No idea about 0, sorry, ask someone else.",
)


def _load(shared: Path, name: str, **settings: object) -> Loaded:
    folder = shared / "cases" / "data"
    if not folder.is_dir():
        pytest.skip(f"the small files are not at {folder}")
    return load(DataConfig(path=str(folder / name), **settings))  # type: ignore[arg-type]


def _chat(*turns: tuple[str, str]) -> str:
    listed = [{"role": role, "content": content} for role, content in turns]
    return json.dumps(listed, ensure_ascii=False, separators=(",", ":"))


WHOLE = {
    "content_list.jsonl": _chat(("user", ASKED)),
    "struct_of_lists.parquet": _chat(("user", ASKED)),
    "jsonstring_cols.jsonl": _chat(("user", ASKED)),
    "pyrepr_cols.jsonl": _chat(("user", ASKED)),
    "messages_in_csv.csv": _chat(("user", ASKED)),
    "orca_null_system.jsonl": _chat(("user", ASKED)),
    "system_field_prompt_list.jsonl": _chat(("system", "Be kind."), ("user", ASKED)),
    "system_field_with_conv.jsonl": _chat(("system", "Be kind."), ("user", ASKED)),
    "llamafactory_alpaca_history.jsonl": _chat(
        ("system", "Be brief."), ("user", ASKED), ("assistant", "ok 0"), ("user", "and more?")
    ),
    "two_arrays.json": ASKED,
    "zst_skippable_frame_first.jsonl.zst": ASKED,
}


@pytest.mark.parametrize("name", WHOLE)
def test_pairs_are_read_whole(shared: Path, name: str) -> None:
    loaded = _load(shared, name)
    frame = loaded.frame
    assert loaded.notes == {"rows_read": 24, "ties_dropped": 0, "faults": 0}
    assert frame[["prompt", "chosen", "rejected"]].iloc[0].to_list() == [WHOLE[name], GOOD, BAD]
    assert set(frame["chat"]) == {WHOLE[name].startswith("[")}
    assert not frame["answer_chat"].any()


def test_a_null_system_is_no_system_turn(shared: Path) -> None:
    prompts = [json.loads(prompt) for prompt in _load(shared, "orca_null_system.jsonl").frame["prompt"]]
    assert {tuple(turn["role"] for turn in turns) for turns in prompts} == {("user",), ("system", "user")}


def test_system_of_labelled_rows(shared: Path) -> None:
    loaded = _load(shared, "kto_system.jsonl")
    assert (loaded.kind, loaded.notes["faults"]) == ("unpaired", 0)
    assert loaded.frame["prompt"][0] == _chat(("system", "Be kind."), ("user", ASKED))


@pytest.mark.parametrize("name", ["jsonstring_cols.jsonl", "pyrepr_cols.jsonl", "messages_in_csv.csv"])
def test_source_in_a_column_is_parsed_and_said(shared: Path, name: str) -> None:
    remark = "chosen holds JSON or Python source, which was parsed (24 rows)"
    assert remark in _load(shared, name).remarks


def test_reasoning_is_kept(shared: Path) -> None:
    frame = _load(shared, "reasoning_content.jsonl").frame
    for side in ("chosen", "rejected"):
        assert all(json.loads(answer)[0]["reasoning_content"] for answer in frame[side])


def test_calls_in_their_canonical_form(shared: Path) -> None:
    row = _load(shared, "tool_calls_history.jsonl").frame.iloc[0]
    call = {"type": "function", "function": {"name": "lookup", "arguments": {"x": 1}}}
    assert json.loads(row["prompt"])[1:] == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42", "name": "lookup"},
    ]
    assert json.loads(row["tools"]) == [
        {"type": "function", "function": {"name": "lookup", "parameters": {}}}
    ]
    answers = _load(shared, "tool_calls_answer.jsonl").frame.iloc[0]
    assert json.loads(answers["chosen"]) == [
        {"role": "assistant", "content": "Let me look.", "tool_calls": [call]}
    ]
    # One side is more than a text, so both are written as messages.
    assert json.loads(answers["rejected"]) == [{"role": "assistant", "content": BAD}]
    assert answers["answer_chat"]


FAULTS = {
    "role_list.jsonl": (6, "prompt holds a message whose role is not one of"),
    "agreement_big.jsonl": (4, "agreement is '10000000000000000000', not a share of votes"),
    "input_non_str.jsonl": (2, "input is a JSON object, not a string"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_odd_row_is_one_fault(shared: Path, name: str) -> None:
    row, why = FAULTS[name]
    loaded = _load(shared, name)
    bad = loaded.frame[loaded.frame["fault"] != ""]
    assert list(bad["row"]) == [row]
    assert why in bad["fault"].iloc[0]
    assert loaded.notes["rows_read"] == 24


def test_garbage_after_the_rows_is_an_error(shared: Path) -> None:
    with pytest.raises(DataError, match=r"garbage_after_array\.json is not valid JSON at row 25"):
        _load(shared, "garbage_after_array.json")


def test_rankings_and_scores_make_pairs(shared: Path) -> None:
    nectar = _load(shared, "nectar.jsonl")
    assert (nectar.format, nectar.kind) == ("ranked", "pairs")
    assert nectar.frame[["prompt", "chosen", "rejected"]].iloc[0].to_list() == [
        f"\n\nHuman: {ASKED}\n\nAssistant:",
        " " + GOOD,
        " " + BAD,
    ]
    assert nectar.frame["margin"].isna().all()  # a rank is no score
    scored = _load(shared, "prompt_answer_score.jsonl")
    assert (scored.format, len(scored.frame)) == ("scored", 12)
    assert scored.frame["chosen"][0].startswith("Birch is known")
    assert set(scored.frame["margin"]) == {1.0}


def test_a_tree_is_read_as_a_tree(shared: Path) -> None:
    with pytest.raises(DataError, match="were read as oasst, but no prompt has two answers"):
        _load(shared, "oasst_flat.jsonl")


def test_labels_as_floats(shared: Path) -> None:
    loaded = _load(shared, "kto_float_label.jsonl")
    assert (loaded.format, loaded.notes["faults"]) == ("kto", 0)
    assert list(loaded.frame["label"][:2]) == [False, True]


@pytest.mark.parametrize(("split", "rows"), [(None, 20), ("train", 20), ("test", 4)])
def test_splits_of_a_cloned_data_set(shared: Path, split: str | None, rows: int) -> None:
    loaded = _load(shared, "hub_clone_train_test", split=split)
    assert len(loaded.frame) == rows
    assert loaded.remarks[0].startswith(f"the split {split or 'train'} was read")
    with pytest.raises(DataError, match="there is no split dev; the files have the splits test, train"):
        _load(shared, "hub_clone_train_test", split="dev")
