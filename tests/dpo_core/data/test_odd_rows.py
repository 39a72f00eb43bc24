"""Odd rows: one fault each, unread columns are named, and near misses name the missing field."""

import contextlib
import json
from pathlib import Path

import pytest

from dpo_core.data.config import DataConfig
from dpo_core.data.files.read import check_source, read_rows
from dpo_core.data.formats import ADAPTERS, recognise
from dpo_core.data.load import load
from dpo_core.data.records import Loaded
from dpo_core.errors import DataError

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


def _lines(path: Path, rows: list[dict], **settings: object) -> Loaded:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load(DataConfig(path=str(path), **settings))  # type: ignore[arg-type]


def _deep(depth: int) -> object:
    value: object = "x"
    for _ in range(depth):
        value = [value]
    return value


ODD = [
    None,
    3,
    True,
    1e400,
    float("nan"),
    [],
    {},
    [1],
    [[]],
    {"role": ["user"]},
    [{"role": 1}],
    "",
    _deep(300),
]


COLUMNS = sorted(
    {column for adapter in ADAPTERS.values() for column in adapter.columns}
    | {"system", "tools", "history", "margin", "agreement", "messages", "text", "input", "turn", "rank"}
)


@pytest.mark.parametrize("name", ADAPTERS)
def test_no_value_in_any_column_ends_the_reading(tmp_path: Path, name: str) -> None:
    rows = [dict.fromkeys(COLUMNS, value) for value in ODD]
    rows += [{"prompt": "p", column: value} for column in COLUMNS for value in ODD]
    two = [{"answer": "a", "score": 1}, {"answer": "b", "score": 2}]  # else a ranking would come to nothing
    rows += [{"prompt": "p", "answers": two, "answer": answer, "score": i} for i, answer in enumerate("ab")]
    rows += [{"message_id": "m", "parent_id": None, "text": "q", "role": "prompter"}]
    rows += [
        {"message_id": a, "parent_id": "m", "text": a, "role": "assistant", "rank": i}
        for i, a in enumerate("ab")
    ]
    loaded = _lines(tmp_path / "x.jsonl", rows, format=name)
    assert loaded.notes["rows_read"] == len(rows)
    assert not loaded.frame["fault"].str.contains("cannot be read").any()


@pytest.mark.parametrize("value", ODD, ids=range(len(ODD)))
def test_no_value_ends_the_recognition(value: object) -> None:
    for row in ({**dict.fromkeys(COLUMNS, value), **PAIR}, dict.fromkeys(COLUMNS, value)):
        with contextlib.suppress(DataError):
            recognise([row])


def test_valid_json_that_python_cannot_hold_is_a_fault_in_its_row(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    good = json.dumps(PAIR)
    deep = '{"prompt": ' + "[" * 50_000 + "]" * 50_000 + "}"
    path.write_text("\n".join([good, deep, '{"prompt": ' + "9" * 5000 + "}", good]) + "\n")
    faults = list(load(DataConfig(path=str(path))).frame["fault"])
    assert [bool(fault) for fault in faults] == [False, True, True, False]
    assert all(fault.startswith("the row is JSON that cannot be read") for fault in faults[1:3])


def test_columns_that_are_not_read_are_named(tmp_path: Path) -> None:
    row = {
        **PAIR,
        "context": "C",
        "score": 3,
        "source": "s",
        "prompt_id": "7",
        "empty": None,
        "language": "en",
    }
    loaded = _lines(tmp_path / "x.jsonl", [row, {**row, "hint": "h"}])
    assert loaded.remarks == ["columns not read: context, hint (1 rows)"]


@pytest.mark.parametrize("key", ["system", "tools", "history", "images", "system_prompt"])
def test_a_column_that_changes_the_row_is_a_fault_where_it_is_not_read(tmp_path: Path, key: str) -> None:
    rows = [{"question": "q", "response_j": "a", "response_k": "b"} for _ in range(3)]
    rows[1][key] = "x"
    faults = list(_lines(tmp_path / "x.jsonl", rows).frame["fault"])
    assert faults == ["", f"{key} is there, and rows of the format stackexchange are read without it", ""]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (
            {"prompt": "p", "chosen": "c", "rejcted": "r"},
            "prompt-pairs, but rejected is missing (similar: rejcted)",
        ),
        ({"prompt": "p", "completion": "c", "label": "maybe"}, "kto, but label is neither true nor false"),
        ({"prompt": "p", "completion": "c", "label": 0.7}, "kto, but label is neither true nor false"),
        ({"question": "q", "response_j": "a", "response": "b"}, "stackexchange, but response_k is missing"),
        ({"prompt": "p", "response_0": "a", "response_1": "b", "better": 1}, "better_response_id is missing"),
    ],
)
def test_the_nearest_format_is_named_first(row: dict, why: str) -> None:
    with pytest.raises(DataError) as caught:
        recognise([row])
    assert why in caught.value.problem


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "output": "o"},
        {"prompt": "p", "answer": "a"},
        {"prompt": "p", "response": "a"},
        {"text": "t", "role": "assistant"},
        {"prompt": "p", "answers": ["a", "b"]},
        {"prompt": "p", "generations": ["a"]},
    ],
)
def test_rows_with_answers_are_no_bare_prompts(row: dict) -> None:
    with pytest.raises(DataError, match="no known format") as caught:
        recognise([row])
    assert "data.format=prompts reads only the prompts" in caught.value.remedy


def test_own_column_names(tmp_path: Path) -> None:
    rows = [{"ask": f"q{i}", "good": "a", "bad": {"text": "b"}, "sys": "S", "more": 1} for i in range(3)]
    path = tmp_path / "x.jsonl"
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad.text", "system": "sys"}
    loaded = _lines(path, rows, columns=columns)
    row = loaded.frame.iloc[0]
    assert (row["chosen"], row["rejected"]) == ("a", "b")
    assert json.loads(row["prompt"])[0] == {"role": "system", "content": "S"}
    assert loaded.remarks == ["columns not read: bad, more"]
    with pytest.raises(DataError, match=r"no row of .* has a column asks \(for prompt\)") as caught:
        load(DataConfig(path=str(path), columns={**columns, "prompt": "asks"}))
    assert "ask, bad, good" in caught.value.remedy
    labelled = load(
        DataConfig(path=str(path), columns={"prompt": "ask", "completion": "good", "label": "more"})
    )
    assert (labelled.kind, labelled.frame["label"].all()) == ("unpaired", True)


def test_source_text_that_is_an_answer_stays_text(tmp_path: Path) -> None:
    rows = [{**PAIR, "prompt": f"p{i}", "chosen": '{"name": "x"}', "rejected": "[1, 2]"} for i in range(4)]
    loaded = _lines(tmp_path / "x.jsonl", rows)
    assert (loaded.frame["chosen"][0], loaded.remarks) == ('{"name": "x"}', [])
    rows[0]["chosen"] = json.dumps([{"role": "user", "content": "x"}])
    assert _lines(tmp_path / "y.jsonl", rows).remarks == [
        "chosen looks like messages written as text, and was read as text (1 rows)"
    ]


def test_source_that_is_cut_off_is_a_fault_where_the_others_are_parsed(tmp_path: Path) -> None:
    text = json.dumps([{"role": "assistant", "content": "a"}])
    rows = [{**PAIR, "chosen": text, "rejected": text.replace('"a"', '"b"')} for _ in range(3)]
    rows[1]["chosen"] = text[:-4]
    faults = list(_lines(tmp_path / "x.jsonl", rows).frame["fault"])
    assert faults == ["", "chosen holds JSON or Python source that cannot be parsed", ""]


def test_numpys_way_of_writing_a_list(tmp_path: Path) -> None:
    text = "[{'role': 'user', 'content': 'Hi'}\n {'role': 'assistant', 'content': 'a'}]"
    rows = [{"chosen": text, "rejected": text.replace("'a'", "'b'")}] * 2
    frame = _lines(tmp_path / "x.jsonl", rows).frame
    assert list(frame.loc[0, ["chosen", "rejected", "fault"]]) == ["a", "b", ""]


def test_a_pointer_to_the_data_is_called_one(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    for read in (check_source, lambda p: list(read_rows(p))):
        with pytest.raises(DataError, match="is a git-lfs pointer, not the data") as caught:
            read(str(path))
        assert "git lfs pull" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('[{"a": 1}]\n[{"a": 2}]', 2),
        ('[{"a": 1}][{"a": 2}, {"a": 3}]\n\n', 3),
        ('{"data": [{"a": 1}], "version": {"x": [1]}}\n{"data": [{"a": 2}]}', 2),
        ('[{"a": 1}]' + " " * 200 + '[{"a": 2}' + " " * 200 + "]", 2),
        ('[]\n[{"a": 1}]', 1),
    ],
)
def test_lists_that_follow_each_other(tmp_path: Path, text: str, rows: int) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    assert sum(len(chunk) for _, chunk in read_rows(str(path))) == rows


@pytest.mark.parametrize(
    "text", ['[{"a": 1}] x', '[{"a": 1}]]', '{"data": [{"a": 1}], "b"', '[{"a": 1}]\n[{"a": 2}']
)
def test_what_follows_a_list_is_not_skipped(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match="is not valid JSON at row"):
        list(read_rows(str(path)))
