"""Adapters: from a row as a file has it to one canonical record, and how a format is recognised.

An adapter raises `Fault` for a row that it cannot use; the reader of records keeps such a row, marked.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from dpo_core.data.config import Format
from dpo_core.errors import DataError

Row = dict[str, Any]
Kind = Literal["pairs", "unpaired", "prompts"]
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
SAMPLE_ROWS = 100


class Fault(Exception):
    """Why one row cannot be used."""


class Pair(NamedTuple):
    """A prompt with a better and a worse answer. `*_ended`: the answer is complete, not cut off. `agreement`:
    share of votes for the better answer, None where nobody counted."""

    prompt: str
    chat: bool
    chosen: str
    rejected: str
    chosen_ended: bool = True
    rejected_ended: bool = True
    agreement: float | None = None
    fault: str = ""


class Unpaired(NamedTuple):
    """A prompt with one answer that was found good (label True) or bad."""

    prompt: str
    chat: bool
    completion: str
    label: bool
    ended: bool = True
    fault: str = ""


class Prompt(NamedTuple):
    """A prompt alone."""

    prompt: str
    chat: bool
    fault: str = ""


Record = Pair | Unpaired | Prompt


# --- fields -----------------------------------------------------------------------------------------------


def _type_of(value: object) -> str:
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return names.get(type(value), type(value).__name__)


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if value is None:
        raise Fault(f"{name} is missing")
    if not isinstance(value, str):
        raise Fault(f"{name} is a JSON {_type_of(value)}, not a string")
    return value


def _flag(row: Row, name: str) -> bool:
    """A truth value; CSV files hold it as a word."""
    value = row.get(name)
    known = {"true": True, "1": True, "false": False, "0": False}
    if value is None:
        raise Fault(f"{name} is missing")
    found = known.get(str(value).strip().lower())
    if found is None:
        raise Fault(f"{name} is neither true nor false")
    return found


# The names of the speakers in the wild, and the ones that chat templates know.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
Messages = list[dict[str, str]]


def _messages(value: object, name: str) -> Messages:
    """Messages as `{role, content}` or `{from, value}`; a single message may stand without its list."""
    listed = [value] if isinstance(value, dict) else value
    if not isinstance(listed, list) or not listed:
        raise Fault(f"{name} is missing" if not listed else f"{name} is a {_type_of(value)}, not messages")
    messages = []
    for message in listed:
        if not isinstance(message, dict):
            raise Fault(f"{name} holds a {_type_of(message)} where a message is expected")
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if role not in ROLES:
            raise Fault(f"{name} holds a message whose role is not one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise Fault(f"{name} holds a message whose content is not a string")
        messages.append({"role": ROLES[role], "content": content})
    return messages


def _answer(messages: Messages, name: str) -> str:
    if messages[-1]["role"] != "assistant":
        raise Fault(f"{name} ends with a turn of the {messages[-1]['role']}, not of the assistant")
    return messages[-1]["content"]


def chat_prompt(messages: Sequence[dict[str, str]]) -> str:
    """The canonical form of a chat prompt: compact JSON of `{role, content}` in that order.

    Raises:
        Fault: there is no message besides the system's, or the last one is the assistant's own.
    """
    if all(message["role"] == "system" for message in messages):
        raise Fault("the prompt has no turn of a user")
    if messages[-1]["role"] == "assistant":
        raise Fault("the prompt ends with a turn of the assistant")
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    return json.dumps(turns, ensure_ascii=False, separators=(",", ":"))


# --- adapters ---------------------------------------------------------------------------------------------


def hh(row: Row) -> Pair:
    """Transcripts; the prompt is everything up to and with the last "Assistant:", and the same in both."""
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    ends = []
    for name, transcript in (("chosen", chosen), ("rejected", rejected)):
        at = transcript.rfind(ASSISTANT)
        if at < 0:
            raise Fault(f"{name} has no turn of the Assistant")
        if transcript.rfind(HUMAN) > at:
            raise Fault(f"{name} ends with a turn of the Human")
        ends.append(at + len(ASSISTANT))
    prompt = chosen[: ends[0]]
    if prompt != rejected[: ends[1]]:
        raise Fault("the transcripts part before the last turn of the Assistant")
    return Pair(prompt, False, chosen[ends[0] :], rejected[ends[1] :])


def prompt_pairs(row: Row) -> Pair:
    """`{prompt, chosen, rejected}` as strings or messages, whose first turns may be the prompt; `agreement`
    may stand beside them."""
    return _prompt_pair(row)._replace(agreement=_agreement(row))


def _agreement(row: Row) -> float | None:
    """The share of votes for the chosen answer where it is given; CSV files hold it as text."""
    given = row.get("agreement")
    try:
        share = -1.0 if isinstance(given, bool) else float("nan" if given in (None, "") else given)
    except (TypeError, ValueError):
        share = -1.0
    if math.isnan(share):  # a field left empty
        return None
    if not 0 <= share <= 1:
        raise Fault(f"agreement is {str(given)[:20]!r}, not a share of votes from 0 to 1")
    return share


def _prompt_pair(row: Row) -> Pair:
    prompt, chosen, rejected = _given_prompt(row), row.get("chosen"), row.get("rejected")
    if not isinstance(chosen, list | dict) and not isinstance(rejected, list | dict):
        chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
        if isinstance(prompt, list):
            return Pair(chat_prompt(_messages(prompt, "prompt")), True, chosen, rejected)
        text = _text({"prompt": prompt}, "prompt")
        if HUMAN in text and chosen.startswith(text) and rejected.startswith(text):
            # Transcripts that repeat their prompt: the answer is what follows it.
            chosen, rejected = chosen[len(text) :], rejected[len(text) :]
        return Pair(text, False, chosen, rejected)
    better, worse = _messages(chosen, "chosen"), _messages(rejected, "rejected")
    answers = _answer(better, "chosen"), _answer(worse, "rejected")
    before = better[:-1]
    if before != worse[:-1]:
        raise Fault("the conversations part before the last turn of the assistant")
    if isinstance(prompt, str):
        if before and not any(m["role"] == "user" and m["content"].strip() == prompt.strip() for m in before):
            raise Fault("prompt is not among the turns before the answers")
        before = before or [{"role": "user", "content": prompt}]
    elif prompt is not None:
        messages = _messages(prompt, "prompt")
        if before and before != messages:
            raise Fault("the turns before the answers are not those of prompt")
        before = messages
    return Pair(chat_prompt(before), True, *answers)


def _given_prompt(row: Row) -> object:
    """The prompt by its usual names: prompt, instruction (+ input) or question, and system beside them."""
    prompt = row.get("prompt")
    if prompt is None and isinstance(row.get("instruction"), str):
        prompt = _instruction(row)
    if prompt is None:
        prompt = row.get("question")
    system = row.get("system")
    if isinstance(system, str) and isinstance(prompt, str):
        turns = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        return turns if system else turns[1:]
    return prompt


def _instruction(row: Row) -> str:
    extra = row.get("input")
    return _text(row, "instruction") + (f"\n\n{_text(row, 'input')}" if extra not in (None, "") else "")


def sharegpt(row: Row) -> Pair:
    """LLaMA-Factory's pairs: `conversations` is the prompt, `chosen` and `rejected` one message each."""
    before = _messages(row.get("conversations"), "conversations")
    system = row.get("system")
    if isinstance(system, str) and system and before[0]["role"] != "system":
        before = [{"role": "system", "content": system}, *before]
    chosen, rejected = _messages(row.get("chosen"), "chosen"), _messages(row.get("rejected"), "rejected")
    if len(chosen) > 1 or len(rejected) > 1:
        raise Fault("chosen and rejected must be one message each beside conversations")
    return Pair(chat_prompt(before), True, _answer(chosen, "chosen"), _answer(rejected, "rejected"))


def pandalm(row: Row) -> Pair | None:
    """Two responses with the annotators' votes (1, 2, or 0 for a tie); None where no majority prefers one."""
    votes = []
    for name in sorted(key for key in row if isinstance(key, str) and key.startswith("annotator")):
        vote = str(row[name]).strip()
        if vote not in ("0", "1", "2"):
            raise Fault(f"{name} is not a vote 0, 1 or 2")
        votes.append(int(vote))
    if not votes:
        raise Fault("the annotators' votes are missing")
    better = next((side for side in (1, 2) if 2 * votes.count(side) > len(votes)), None)
    if better is None:
        return None
    chosen, rejected = _text(row, f"response{better}"), _text(row, f"response{3 - better}")
    return Pair(_instruction(row), False, chosen, rejected, agreement=votes.count(better) / len(votes))


def stackexchange(row: Row) -> Pair:
    """A question with a better-voted answer (j) and a worse one (k)."""
    return Pair(_text(row, "question"), False, _text(row, "response_j"), _text(row, "response_k"))


def kto(row: Row) -> Unpaired:
    """`{messages, label}` or `{prompt, completion, label}`, the two fields strings or messages."""
    label = _flag(row, "label")
    if row.get("messages") is not None:
        messages = _messages(row["messages"], "messages")
        return Unpaired(chat_prompt(messages[:-1]), True, _answer(messages, "messages"), label)
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(completion, list | dict):
        answer = _messages(completion, "completion")
        if len(answer) > 1:
            raise Fault("completion must be one message")
        before = (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages(prompt, "prompt")
        )
        return Unpaired(chat_prompt(before), True, _answer(answer, "completion"), label)
    if isinstance(prompt, list):
        return Unpaired(chat_prompt(_messages(prompt, "prompt")), True, _text(row, "completion"), label)
    return Unpaired(_text(row, "prompt"), False, _text(row, "completion"), label)


def prompts(row: Row) -> Prompt:
    """`{prompt}` as a string or messages, or `{text}`."""
    if isinstance(row.get("prompt"), list):
        return Prompt(chat_prompt(_messages(row["prompt"], "prompt")), True)
    return Prompt(_text(row, "prompt" if row.get("prompt") is not None else "text"), False)


# --- recognition ------------------------------------------------------------------------------------------


def _has(row: Row, *names: str) -> bool:
    return all(row.get(name) is not None for name in names)


def _is_hh(row: Row) -> bool:
    both = row.get("chosen"), row.get("rejected")
    return row.get("prompt") is None and all(isinstance(t, str) and ASSISTANT in t for t in both)


def _is_prompt_pairs(row: Row) -> bool:
    if not _has(row, "chosen", "rejected") or row.get("conversations") is not None:
        return False
    return _given_prompt(row) is not None or all(isinstance(row[n], list) for n in ("chosen", "rejected"))


def _is_kto(row: Row) -> bool:
    label = row.get("label")
    truth = isinstance(label, bool | int) or str(label).strip().lower() in ("true", "false", "0", "1")
    return truth and (_has(row, "messages") or _has(row, "prompt", "completion"))


ANSWERS = ("chosen", "rejected", "completion", "messages", "conversations", "response", "label_confidence")


def _is_prompts(row: Row) -> bool:
    answered = any(row[key] is not None and str(key).startswith(ANSWERS) for key in row)
    return not answered and (isinstance(row.get("prompt"), str | list) or isinstance(row.get("text"), str))


@dataclass(frozen=True)
class Adapter:
    """One format: what its rows become, how they look, and the function that converts one."""

    kind: Kind
    looks: str
    fits: Callable[[Row], bool]
    convert: Callable[[Row], Record | None]


ADAPTERS: dict[Format, Adapter] = {
    "hh": Adapter("pairs", "chosen and rejected are Human/Assistant transcripts", _is_hh, hh),
    "prompt-pairs": Adapter(
        "pairs",
        "a prompt (or the turns inside the answers) with chosen and rejected",
        _is_prompt_pairs,
        prompt_pairs,
    ),
    "sharegpt": Adapter(
        "pairs",
        "conversations with a chosen and a rejected message",
        lambda row: _has(row, "conversations", "chosen", "rejected"),
        sharegpt,
    ),
    "pandalm": Adapter(
        "pairs",
        "an instruction, response1 and response2, and annotators' votes",
        lambda row: _has(row, "instruction", "response1", "response2", "annotator1"),
        pandalm,
    ),
    "stackexchange": Adapter(
        "pairs",
        "a question with response_j preferred to response_k",
        lambda row: _has(row, "question", "response_j", "response_k"),
        stackexchange,
    ),
    "kto": Adapter("unpaired", "one answer a row with a true/false label", _is_kto, kto),
    "prompts": Adapter("prompts", "a prompt or text and no answer", _is_prompts, prompts),
}


def recognise(rows: Sequence[Row]) -> tuple[Format, str]:
    """The one format that at least half of the first rows fit, and a sentence that says why.

    Raises:
        DataError: no format fits, or several do.
    """
    sample = rows[:SAMPLE_ROWS]
    fitting = {
        name: count
        for name, adapter in ADAPTERS.items()
        if 2 * (count := sum(adapter.fits(row) for row in sample)) >= len(sample) > 0
    }
    if len(fitting) == 1:
        ((name, count),) = fitting.items()
        return name, f"{count} of the first {len(sample)} rows are {name}: {ADAPTERS[name].looks}"
    fields: dict[str, set[str]] = {}
    for row in sample:
        for key, value in row.items():
            fields.setdefault(str(key), set()).add("missing" if value is None else _type_of(value))
    seen = ", ".join(f"{key} ({' or '.join(sorted(types))})" for key, types in fields.items())
    if fitting:
        many = "; ".join(f"{name}: {ADAPTERS[name].looks}" for name in fitting)
        raise DataError(
            f"the rows fit several formats ({many}); the fields are {seen}",
            f"Set data.format to the one that is meant: {', '.join(fitting)}",
        )
    every = "; ".join(f"{name}: {adapter.looks}" for name, adapter in ADAPTERS.items())
    raise DataError(
        f"the rows fit no known format; the fields are {seen}",
        f"Rename the fields, or set data.format to one of these ({every})",
    )
