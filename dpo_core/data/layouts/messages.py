"""Converts conversations from the forms found in files to canonical messages.

A canonical message has `role` and `content`, and if not empty `reasoning_content`, `tool_calls`, `name` and
`tool_call_id`, in this order.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from dpo_core.data.layouts.fields import (
    Fault,
    Row,
    SourceRow,
    compact,
    is_empty,
    objects,
    optional_text,
    remark,
    type_of,
)
from dpo_core.data.layouts.structured import parse_source

Message = dict[str, Any]
Messages = list[Message]

# Names of speakers in data files, and the roles of chat templates.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_PAYLOADS = ("image", "images", "audio", "video", "videos", "file", "files")
_READ = {"role", "from", "content", "value", "tool_calls", "function_call", "name", "tool_call_id"}
# Fields without content to learn, for which there is no remark.
_HARMLESS = {"id", "message_id", "index", "timestamp", "created_at", "num_tokens", "loss", "turn_identifier"}


def read_messages(row: Row, value: object, name: str) -> Messages:
    """Messages as `{role, content}` or `{from, value}`, in a list or a single one.

    Raises:
        Fault: a message is not an object, or has an unknown role or unsupported content.
    """
    single = isinstance(value, dict) and any(isinstance(value.get(key), str) for key in ("role", "from"))
    listed = [value] if single else value
    if is_empty(listed):
        raise Fault(f"{name} is missing")
    if not isinstance(listed, list | dict):
        raise Fault(f"{name} is a {type_of(listed)}, not messages")
    turns = [_message(row, message, name) for message in objects(listed, name)]
    if not turns:  # an object of empty lists
        raise Fault(f"{name} is missing")
    return turns


def _message(row: Row, message: Row, name: str) -> Message:
    role = _role(row, message, name)
    called = message.get("from") == "function_call" or message.get("role") == "function_call"
    reasoning = next((message[key] for key in _REASONING if not is_empty(message.get(key))), None)
    if reasoning is not None and not isinstance(reasoning, str):
        raise Fault(f"{name} holds a message whose reasoning_content is a {type_of(reasoning)}")
    calls = _tool_calls(message, name)
    content = _content(message, name, optional=bool(reasoning or calls))
    if called:  # LLaMA-Factory writes the call as the text of a turn
        calls, content = _tool_calls({"tool_calls": content}, name), ""
    read: Message = {"role": role, "content": content}
    more = {"reasoning_content": reasoning, "tool_calls": calls}
    more["name"] = message.get("name") if role != "assistant" else None
    more["tool_call_id"] = message.get("tool_call_id")
    read |= {key: value for key, value in more.items() if not is_empty(value)}
    for key in ("name", "tool_call_id"):
        if not isinstance(read.get(key, ""), str):
            raise Fault(f"{name} holds a message whose {key} is not a string")
    for key, value in message.items():
        if is_empty(value) or key in _READ or key in _REASONING:
            continue
        if key in _PAYLOADS:
            raise Fault(f"{name} holds a message with {key}: only text is read")
        if key not in _HARMLESS:
            remark(row, f"{key} of messages is not read")
    return read


def _role(row: Row, message: Row, name: str) -> str:
    written = message.get("from") if message.get("role") is None else message.get("role")
    role = ROLES.get(written.strip().lower()) if isinstance(written, str) else None
    if role is None:
        roles = "system, user, assistant or tool, nor one of their usual other names"
        raise Fault(f"{name} holds a message whose role is not one of {roles}: {str(written)[:30]!r}")
    if role != written:
        remark(row, f"the role {written} is read as {role}")
    return role


def _content(message: Row, name: str, *, optional: bool) -> str:
    """The text of a message; a list of text parts is joined."""
    content = message.get("value") if message.get("content") is None else message.get("content")
    if isinstance(content, str):
        return content
    if content is None and optional:
        return ""
    wrong = f"{name} holds a message whose content is not a string or a list of text parts"
    if not isinstance(content, list):
        raise Fault(wrong)
    texts = []
    for part in content:
        if isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] != "text":
            raise Fault(f"{name} holds a message with a part of type {part['type']}: only text is read")
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise Fault(wrong)
        texts.append(text)
    return "".join(texts)


def _tool_calls(message: Row, name: str) -> list[Row]:
    """Calls as `{type, function: {name, arguments}}`, with the arguments as an object as templates expect."""
    value = message.get("tool_calls")
    if is_empty(value) and not is_empty(message.get("function_call")):
        value = message["function_call"]  # the older form, one call
    if is_empty(value):
        return []
    key = f"tool_calls of {name}"
    if isinstance(value, str):
        value = parse_source(value)
        if value is None:
            raise Fault(f"{key} is text that is no JSON")
    calls = []
    for call in objects(value if isinstance(value, list) else [value], key):
        function = call.get("function", call)
        called = function.get("name") if isinstance(function, dict) else None
        if not isinstance(called, str):
            raise Fault(f"{key} holds a call without the name of a function")
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):
            arguments = parse_source(arguments) if arguments.strip() else {}
        if not isinstance(arguments, dict | None):
            raise Fault(f"{key}: the arguments of {called} are no JSON object")
        if isinstance(function.get("arguments"), str) and arguments is None:
            raise Fault(f"{key}: the arguments of {called} are no JSON object")
        base = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({**base, "type": "function", "function": {"name": called, "arguments": arguments or {}}})
    return calls


def read_tools(row: Row) -> str:
    """The functions that the model may call, as compact JSON in the form of chat templates; "" for none.

    Raises:
        Fault: `tools` (or `functions`) is not a list of objects with names.
    """
    name = "tools" if not is_empty(row.get("tools")) else "functions"
    value = row.get(name)
    if isinstance(value, str):
        parsed = parse_source(value)
        if parsed is None and value.strip():
            raise Fault(f"{name} is text that is no JSON")
        value = parsed
    if is_empty(value):
        return ""
    listed = value if isinstance(value, list) else [value]
    tools = []
    for tool in objects([parse_source(t) if isinstance(t, str) else t for t in listed], name):
        if not isinstance(tool.get("function"), dict):
            if not isinstance(tool.get("name"), str):
                raise Fault(f"{name} holds an object without the name of a function")
            tools.append({"type": "function", "function": tool})
            remark(row, f"{name}: functions without their type were read as type function")
        else:
            tools.append(tool)
    return _json(tools, name)


def chat_prompt(messages: Sequence[Message]) -> str:
    """The canonical form of a chat prompt: compact JSON of its messages.

    Raises:
        Fault: there is no message besides the system's, or the last one is the assistant's.
    """
    if all(message["role"] == "system" for message in messages):
        raise Fault("the prompt has no turn of a user")
    if messages[-1]["role"] == "assistant":
        raise Fault("the prompt ends with a turn of the assistant")
    return _json(list(messages), "prompt")


def _json(value: object, name: str) -> str:
    try:
        return compact(value)
    except ValueError as error:
        raise Fault(f"{name} holds a number that JSON does not have (NaN or infinity)") from error
    except TypeError as error:
        raise Fault(f"{name} holds something that is no JSON ({error})") from error


SYSTEM_NAMES = ("system", "system_prompt", "system_message")


def read_prompt(row: Row, value: object, name: str = "prompt", tools: str = "") -> tuple[str, bool]:
    """The canonical prompt and whether it is a chat. Text stays text, unless a system text, earlier turns or
    tools belong to it, here or (system texts) in other rows of the set."""
    system, history = optional_text(row, *SYSTEM_NAMES)[0], _history(row)
    if isinstance(value, str):
        # An empty system field: the row is of a set of chats, and this chat has no system turn.
        chat = isinstance(row.get("system"), str) or (isinstance(row, SourceRow) and row.as_chat)
        if not (chat or system or history or tools):
            return value, False
        turns: Messages = [{"role": "user", "content": value}]
    else:
        turns = read_messages(row, value, name)
    return chat_prompt(add_system(history + turns if history else turns, system)), True


def add_system(turns: Messages, system: str) -> Messages:
    """The turns with the row's system text in front.

    Raises:
        Fault: they begin with a different system text.
    """
    if not system or turns[:1] == [{"role": "system", "content": system}]:
        return turns
    if turns and turns[0]["role"] == "system":
        raise Fault("system differs from the system turn that the conversation begins with")
    return [{"role": "system", "content": system}, *turns]


def _history(row: Row) -> Messages:
    """Earlier turns, as LLaMA-Factory's pairs of question and answer or as messages."""
    value = row.get("history")
    if isinstance(value, str):
        value = parse_source(value) if value.strip() else None
        if value is None and not is_empty(row.get("history")):
            raise Fault("history is a string, not earlier turns")
    if is_empty(value):
        return []
    if not isinstance(value, list) or isinstance(value[0], dict):
        return read_messages(row, value, "history")
    turns: Messages = []
    for pair in value:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(t, str) for t in pair)):
            raise Fault("history is not a list of pairs of a question and its answer")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return turns


def read_answer(row: Row, value: object, name: str) -> Messages:
    """The turns of an answer: text, one message, or several that begin and end with the assistant."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    turns = read_messages(row, value, name)
    check_answer(turns, name)
    return turns


def check_answer(turns: Messages, name: str) -> None:
    """Check that an answer begins and ends with the assistant, without system or repeated assistant turns.

    Raises:
        Fault: the check fails.
    """
    if not turns:
        raise Fault(f"{name} has no turn of the assistant")
    if turns[-1]["role"] != "assistant":
        raise Fault(f"{name} ends with a turn of the {turns[-1]['role']}, not of the assistant")
    if turns[0]["role"] != "assistant":
        raise Fault(f"{name} begins with a turn of the {turns[0]['role']}, not of the assistant")
    for before, after in pairwise(turns):
        if after["role"] == "system" or (before["role"], after["role"]) == ("assistant", "assistant"):
            raise Fault(f"{name} holds a turn of the {after['role']} where it cannot stand")


def write_answers(*answers: Messages) -> tuple[list[str], bool]:
    """The canonical answers of a row, and whether they are JSON lists of messages. All are if one of them is
    more than a single text (tool calls, reasoning, several turns)."""
    plain = all(len(turns) == 1 and turns[0].keys() == {"role", "content"} for turns in answers)
    if plain:
        return [turns[0]["content"] for turns in answers], False
    for turns in answers:
        if turns[-1].keys() == {"role", "content"} and not turns[-1]["content"].strip():
            # As JSON it would not be empty for the gate's rules for empty answers.
            raise Fault("an answer is empty, or its last turn is")
    return [_json(turns, "an answer") for turns in answers], True


def common_turns(better: Messages, worse: Messages) -> int:
    """The number of common turns of two conversations before the answers begin.

    Raises:
        Fault: the first different turn is not the assistant's.
    """
    if better[:-1] == worse[:-1]:
        return len(better) - 1
    same = 0
    while same < min(len(better), len(worse)) and better[same] == worse[same]:
        same += 1
    parted = [turns[same]["role"] if same < len(turns) else "end" for turns in (better, worse)]
    if same == 0 or parted != ["assistant", "assistant"]:
        raise Fault("the conversations part before the last turn of the assistant, at a turn of another role")
    return same
