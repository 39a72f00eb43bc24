"""Conversations in the forms of data files: roles, parts, tool calls, system texts, several turns."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_core.data.config import DataConfig
from dpo_core.data.formats import ADAPTERS
from dpo_core.data.layouts.fields import Fault, PromptFields
from dpo_core.data.load import load
from dpo_core.data.records import Loaded, record_id

USER, GOOD, BAD = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "assistant", "content": "no"},
)
CALL = {"type": "function", "function": {"name": "look", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def _lines(path: Path, rows: list[dict]) -> Loaded:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load(DataConfig(path=str(path)))


def _turns(row: dict, name: str = "prompt-pairs") -> list[dict]:
    return json.loads(ADAPTERS[name].convert(row).prompt)  # type: ignore[index]


@pytest.mark.parametrize(
    ("role", "known"),
    [
        ("developer", "system"),
        ("human", "user"),
        ("prompter", "user"),
        ("User", "user"),
        ("gpt", "assistant"),
        ("model", "assistant"),
        ("bot", "assistant"),
        ("observation", "tool"),
        ("ipython", "tool"),
    ],
)
def test_other_names_of_roles_are_mapped_and_said(tmp_path: Path, role: str, known: str) -> None:
    row = {"prompt": [{"role": role, "content": "x"}, USER], "chosen": "a", "rejected": "b"}
    loaded = _lines(tmp_path / "x.jsonl", [row] * 3)
    assert json.loads(loaded.frame["prompt"][0])[0] == {"role": known, "content": "x"}
    assert loaded.remarks == [f"the role {role} is read as {known} (3 rows)"]


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        CALL,
        [{"name": "look", "arguments": {"x": 1}}],
        [{"function": {"name": "look", "arguments": '{"x": 1}'}}],
        json.dumps([CALL]),
    ],
)
def test_calls_have_one_form(calls: Any) -> None:
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    turns = _turns(
        {"prompt": [USER, message, {"role": "tool", "content": "4"}], "chosen": "a", "rejected": "b"}
    )
    assert turns[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_the_older_call_and_llama_factorys() -> None:
    old = {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": '{"x":1}'}}
    result = {"role": "function", "name": "look", "content": "4"}
    turns = _turns({"prompt": [USER, old, result], "chosen": "a", "rejected": "b"})
    assert turns[1]["tool_calls"] == [CALL]
    assert turns[2] == {"role": "tool", "content": "4", "name": "look"}
    turns = _turns(
        {
            "tools": json.dumps([{"name": "look", "parameters": {}}]),
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": '{"name": "look", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "4"},
            ],
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        "sharegpt",
    )
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool"]
    assert turns[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize("tools", [[TOOL], TOOL, [TOOL["function"]], json.dumps([TOOL]), [json.dumps(TOOL)]])
@pytest.mark.parametrize("prompt", ["Hi", [USER]])
def test_tools_travel_with_the_row_and_make_a_chat(tools: Any, prompt: Any) -> None:
    pair = ADAPTERS["prompt-pairs"].convert(
        {"tools": tools, "prompt": prompt, "chosen": "a", "rejected": "b"}
    )
    assert (json.loads(pair.tools), json.loads(pair.prompt), pair.chat) == ([TOOL], [USER], True)
    kto = ADAPTERS["kto"].convert({"tools": tools, "prompt": prompt, "completion": "a", "label": 1})
    assert (json.loads(kto.tools), kto.chat) == ([TOOL], True)
    alone = ADAPTERS["prompts"].convert({"tools": tools, "prompt": prompt})
    assert (json.loads(alone.tools), alone.chat) == ([TOOL], True)


def test_no_tools_leave_text_as_it_is() -> None:
    for tools in (None, [], "", "  "):
        pair = ADAPTERS["prompt-pairs"].convert(
            {"tools": tools, "prompt": "p", "chosen": "a", "rejected": "b"}
        )
        assert (pair.prompt, pair.chat, pair.tools) == ("p", False, "")


def test_ids_tell_tools_and_forms_of_answers_apart() -> None:
    pair = ADAPTERS["prompt-pairs"].convert({"prompt": [USER], "chosen": "a", "rejected": "b"})
    assert (
        len({record_id(p) for p in (pair, pair._replace(tools="[]"), pair._replace(answer_chat=True))}) == 3
    )
    assert record_id(PromptFields("p", True)) != record_id(PromptFields("p", True, tools="[]"))


def test_answers_of_several_turns() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "4"}
    row = {"chosen": [USER, call, result, GOOD], "rejected": [USER, BAD]}
    pair = ADAPTERS["prompt-pairs"].convert(row)
    assert (json.loads(pair.prompt), pair.answer_chat) == ([USER], True)
    assert json.loads(pair.chosen) == [call, result, GOOD]
    assert json.loads(pair.rejected) == [BAD]
    # The same with the prompt beside the answers, and with answers alone.
    assert ADAPTERS["prompt-pairs"].convert({"prompt": [USER], **row}) == pair
    apart = {"prompt": [USER], "chosen": row["chosen"][1:], "rejected": row["rejected"][1:]}
    assert ADAPTERS["prompt-pairs"].convert(apart) == pair
    assert ADAPTERS["prompt-pairs"].convert({**apart, "prompt": "Hi"}) == pair


def test_reasoning_by_its_other_names_is_kept() -> None:
    for name in ("reasoning_content", "reasoning", "thinking"):
        row = {"prompt": [USER], "chosen": [{**GOOD, name: "hm"}], "rejected": [BAD]}
        pair = ADAPTERS["prompt-pairs"].convert(row)
        assert json.loads(pair.chosen) == [{**GOOD, "reasoning_content": "hm"}]


FAULTS: dict[str, tuple[dict, str]] = {
    "image part": (
        {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "prompt holds a message with a part of type image_url: only text is read",
    ),
    "image beside the text": ({"prompt": [{**USER, "images": ["x.png"]}]}, "with images: only text is read"),
    "unhashable role": ({"prompt": [{"role": {}, "content": "x"}]}, "whose role is not one of"),
    "an object of empty lists": ({"prompt": {"role": [], "content": []}}, "prompt is missing"),
    "no role": ({"prompt": [{"content": "x"}]}, "whose role is not one of"),
    "no content": ({"prompt": [{"role": "user", "content": None}]}, "content is not a string"),
    "call without a name": (
        {"prompt": [{"role": "assistant", "tool_calls": [{"x": 1}]}, USER]},
        "tool_calls of prompt holds a call without the name of a function",
    ),
    "arguments that are no object": (
        {"prompt": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1"}]}, USER]},
        "the arguments of f are no JSON object",
    ),
    "tools that are text": ({"tools": "hammer"}, "tools is text that is no JSON"),
    "tools without names": ({"tools": [{"x": 1}]}, "tools holds an object without the name"),
    "not a number in tools": (
        {"tools": [{"name": "f", "x": float("nan")}]},
        "tools holds a number that JSON does not have",
    ),
    "history that is text": ({"history": "once"}, "history is a string, not earlier turns"),
    "history of triples": ({"history": [["a", "b", "c"]]}, "history is not a list of pairs"),
    "system that is a list": ({"system": [1]}, "system is a JSON list, not a string"),
    "another system turn": (
        {"system": "A", "prompt": [{"role": "system", "content": "B"}, USER]},
        "system differs from the system turn",
    ),
    "an empty answer beside a call": (
        {"chosen": [{"role": "assistant", "tool_calls": [CALL]}], "rejected": [{**BAD, "content": " "}]},
        "an answer is empty, or its last turn is",
    ),
    "reasoning that is a list": (
        {"prompt": [{**GOOD, "reasoning_content": ["x"]}, USER]},
        "reasoning_content is a list",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_no_template_could_write_is_a_fault(case: str) -> None:
    change, why = FAULTS[case]
    with pytest.raises(Fault) as caught:
        ADAPTERS["prompt-pairs"].convert({"prompt": [USER], "chosen": "a", "rejected": "b", **change})
    assert why in str(caught.value)


def test_conversations_that_part_at_the_user_are_a_fault() -> None:
    other = {"role": "user", "content": "Ho"}
    with pytest.raises(Fault, match="part before the last turn of the assistant"):
        ADAPTERS["prompt-pairs"].convert(
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, other, BAD]}
        )


def test_parquet_gives_each_call_its_own_arguments_alone(tmp_path: Path) -> None:
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": 2}}]
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]} for call in calls]
    rows = [{"prompt": [USER, message, USER], "chosen": "a", "rejected": "b"} for message in messages]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    prompts = load(DataConfig(path=str(tmp_path / "x.parquet"))).frame["prompt"]
    functions = [json.loads(prompt)[1]["tool_calls"][0]["function"] for prompt in prompts]
    assert functions == calls  # Arrow's table has y: null in the first and x: null in the second


def test_a_system_text_in_one_row_makes_chats_of_all(tmp_path: Path) -> None:
    rows: list[dict] = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(4)]
    assert not _lines(tmp_path / "a.jsonl", rows).frame["chat"].any()
    rows[2]["system"] = "S"
    rows[3]["system"] = None
    frame = _lines(tmp_path / "b.jsonl", rows).frame
    assert frame["chat"].all()
    assert [len(json.loads(prompt)) for prompt in frame["prompt"]] == [1, 1, 2, 1]


def test_text_beside_chats_is_said(tmp_path: Path) -> None:
    rows = [{"prompt": p, "chosen": "a", "rejected": "b"} for p in ("x", [USER])]
    (remark,) = _lines(tmp_path / "x.jsonl", rows).remarks
    assert remark.startswith("1 prompts are conversations and 1 plain text")
