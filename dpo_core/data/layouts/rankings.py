"""Adapters for answers with scores or ranks (lists, single rows, conversation trees), and their pairs."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from dpo_core.data.layouts.adapter import Adapter
from dpo_core.data.layouts.fields import (
    Fault,
    PairFields,
    Ranked,
    Row,
    SourceRow,
    has,
    is_empty,
    number,
    objects,
    optional_text,
    remark,
    required_number,
    text,
    type_of,
)
from dpo_core.data.layouts.messages import ROLES, Messages, chat_prompt, read_prompt, read_tools

_LISTS = ("answers", "completions", "responses", "candidates", "generations", "outputs", "choices")
_TEXTS = ("answer", "response", "text", "completion", "content", "output", "generation")
# UltraFeedback's overall_score is known to be wrong for some answers: the mean of its ratings is preferred.
_ITEM_SCORES = ("fine-grained_score", "score", "overall_score", "rating", "reward", "pm_score")
_RANKS = ("rank", "ranking")
_PARALLEL = ("scores", "ratings", "rewards", "rating", "score", "ranks", "rankings", "rank")


def _list_of(row: Row) -> str | None:
    """The column of the ranked answers."""
    for name in _LISTS:
        value = row.get(name)
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            if any(isinstance(row.get(other), list) for other in _PARALLEL):
                return name
        elif isinstance(value, list | dict) and value:
            items = objects(value, name)
            first = items[0] if items else {}
            if any(key in first for key in _TEXTS) and any(key in first for key in (*_ITEM_SCORES, *_RANKS)):
                return name
    return None


_PROMPTS = ("prompt", "instruction", "question", "input", "query")


def _prompt_name(row: Row) -> str | None:
    return next((name for name in _PROMPTS if isinstance(row.get(name), str | list | dict)), None)


def is_ranked(row: Row) -> bool:
    """A prompt and a list of answers with scores or ranks."""
    return _prompt_name(row) is not None and row.get("chosen") is None and _list_of(row) is not None


def ranked(row: Row) -> Ranked:
    """UltraFeedback, Nectar, Stack Exchange preferences, and similar lists."""
    name, column = _prompt_name(row), _list_of(row)
    if name is None:
        raise Fault("prompt is missing")
    prompt, chat, tools, space = *_ranked_prompt(row, name), ""
    if column is None:
        if any(row.get(listed) == [] for listed in _LISTS):
            return Ranked(prompt, chat, tools, [])
        raise Fault("there is no list of answers with a score or a rank each")
    if not chat and prompt.endswith("Assistant: "):
        # The space belongs to the answer, as in HH: tokenizers join it with the next word.
        prompt, space = prompt[:-1], " "
    where = row.number if isinstance(row, SourceRow) else 0
    value = row[column]
    if isinstance(value, list) and value and isinstance(value[0], str):
        other = next(other for other in _PARALLEL if isinstance(row.get(other), list))
        marks = row[other]
        if len(marks) != len(value) or not all(isinstance(answer, str) for answer in value):
            raise Fault(f"{column} and {other} are not lists of the same length")
        items = [{"text": answer, other: mark} for answer, mark in zip(value, marks, strict=True)]
        keys: tuple[str, ...] = (other,)
    else:
        items, keys = objects(value, column), (*_ITEM_SCORES, *_RANKS)
    key = next((k for k in keys if any(not is_empty(item.get(k)) for item in items)), None)
    if key is None:
        raise Fault(f"{column} holds no scores")
    sign = -1.0 if "rank" in key else 1.0
    answers = []
    for item in items:
        answer = optional_text(item, *_TEXTS)[0]
        score = number(item, key)
        if score is None:
            remark(row, f"answers without {key} are left out")
            continue
        answers.append((space + answer, sign * score, where))
    return Ranked(prompt, chat, tools, answers, scored="rank" not in key)


def _ranked_prompt(row: Row, name: str) -> tuple[str, bool, str]:
    tools = read_tools(row)
    value = row[name]
    if name == "instruction" and isinstance(value, str) and not is_empty(row.get("input")):
        value = f"{value}\n\n{text(row, 'input')}"
    return *read_prompt(row, value, name, tools), tools


class ScoredAnswer(NamedTuple):
    """One answer to a prompt with its score, to be ranked among those of the other rows."""

    prompt: str
    chat: bool
    tools: str
    answer: str
    score: float
    ranks: bool


_ANSWER_NAMES = ("answer", "response", "completion", "output", "generation")
_SCORE_NAMES = ("score", "rating", "reward", "overall_score", "helpfulness", "rank")


def is_scored(row: Row) -> bool:
    """A prompt, one answer and a number; a row that also has a label is an unpaired row."""
    if _prompt_name(row) is None or has(row, "chosen") or has(row, "label") or has(row, "message_id"):
        return False
    answer = any(isinstance(row.get(name), str) for name in _ANSWER_NAMES)
    return answer and any(_is_number(row.get(name)) for name in _SCORE_NAMES)


def _is_number(value: object) -> bool:
    try:
        return not isinstance(value, bool | list | dict) and not is_empty(value) and float(str(value)) < 1e300
    except ValueError:
        return False


def scored(row: Row) -> ScoredAnswer:
    """`{prompt, answer, score}`; for HelpSteer the score is the helpfulness."""
    name = _prompt_name(row)
    if name is None:
        raise Fault("prompt is missing")
    key = next((key for key in _SCORE_NAMES if not is_empty(row.get(key))), None)
    if key is None:
        raise Fault("score is missing")
    answer = next((n for n in _ANSWER_NAMES if row.get(n) is not None), "answer")
    prompt, chat, tools = _ranked_prompt(row, name)
    score = required_number(row, key)
    return ScoredAnswer(
        prompt, chat, tools, text(row, answer), -score if key == "rank" else score, key == "rank"
    )


def by_prompt(parts: list[tuple[int, ScoredAnswer]], remarks: Counter[str]) -> Iterable[Ranked]:
    """One ranked list for each prompt, in the order in which the prompts appear."""
    lists: dict[tuple[str, bool, str], Ranked] = {}
    for row, part in parts:
        empty = Ranked(part.prompt, part.chat, part.tools, [], scored=not part.ranks)
        lists.setdefault(part[:3], empty).answers.append((part.answer, part.score, row))
    return lists.values()


class TreeMessage(NamedTuple):
    """A message of a conversation tree."""

    id: str
    parent: str | None
    role: str
    content: str
    rank: float | None


def is_oasst(row: Row) -> bool:
    """A message with its parent's id, or a full tree under `prompt`."""
    tree = row.get("prompt")
    if isinstance(tree, dict):
        return "replies" in tree and isinstance(tree.get("text"), str)
    return "parent_id" in row and has(row, "message_id", "text", "role")


def oasst(row: Row) -> list[TreeMessage]:
    """The messages of a row: one message or all messages of a tree."""
    waiting = [(row["prompt"] if isinstance(row.get("prompt"), dict) else row, row.get("parent_id"))]
    nodes: list[TreeMessage] = []
    while waiting:
        message, parent = waiting.pop(0)
        role = message.get("role")
        if not isinstance(role, str) or role not in ("prompter", "user", "assistant"):
            raise Fault(f"role is {str(role)[:30]!r}, neither prompter nor assistant")
        name = text(message, "message_id")
        if not isinstance(parent, str | None):
            raise Fault(f"parent_id is a {type_of(parent)}, not a string")
        if message.get("deleted") is True:
            remark(row, "deleted messages are left out")
            continue
        nodes.append(
            TreeMessage(name, parent or None, ROLES[role], text(message, "text"), number(message, "rank"))
        )
        replies = message.get("replies")
        if not is_empty(replies):
            waiting += [(reply, name) for reply in objects(replies, "replies")]
    return nodes


def by_tree(parts: list[tuple[int, list[TreeMessage]]], remarks: Counter[str]) -> Iterable[Ranked]:
    """The ranked replies of the assistant to each message, with the conversation before them."""
    nodes = {node.id: node for _, listed in parts for node in listed}
    lists: dict[str, Ranked] = {}
    for row, listed in parts:
        for node in listed:
            if node.role != "assistant" or node.rank is None or node.parent is None:
                continue
            turns = _path(nodes, node.parent)
            if turns is None:
                remarks["ranked replies whose earlier messages are not in the data were left out"] += 1
                continue
            empty = Ranked(chat_prompt(turns), True, "", [], scored=False)
            lists.setdefault(node.parent, empty).answers.append((node.content, -node.rank, row))
    return lists.values()


def _path(nodes: dict[str, TreeMessage], last: str) -> Messages | None:
    """The turns from the root to a message; None if one is missing or they form a cycle."""
    turns: Messages = []
    current: str | None = last
    visited: set[str] = set()
    while current is not None:
        node = nodes.get(current)
        if node is None or current in visited:
            return None
        visited.add(current)
        turns.insert(0, {"role": node.role, "content": node.content})
        current = node.parent
    return turns if turns[-1]["role"] == "user" else None


# --- from ranked lists to pairs ---------------------------------------------------------------------------


def pairs_of(ranked: Ranked, mode: str) -> list[tuple[PairFields, int]]:
    """Pairs of a ranked list with the row of the chosen answer. `best_worst`: one pair; `adjacent`: each
    answer with the next worse one; `all`: every two answers. Equal scores make no pair."""
    order = sorted(ranked.answers, key=lambda answer: -answer[1])
    last = len(order) - 1
    places = {
        "best_worst": [(0, last)] if last > 0 else [],
        "adjacent": [(i, i + 1) for i in range(last)],
        "all": [(i, k) for i in range(last + 1) for k in range(i + 1, last + 1)],
    }[mode]
    return [
        (
            PairFields(
                ranked.prompt,
                ranked.chat,
                order[i][0],
                order[k][0],
                tools=ranked.tools,
                margin=order[i][1] - order[k][1] if ranked.scored else None,
            ),
            order[i][2],
        )
        for i, k in places
        if order[i][1] > order[k][1]
    ]


FORMATS = {
    "ranked": Adapter(
        "a prompt with a list of answers, each with a score or a rank",
        ranked,
        ("prompt", "answers"),
        is_ranked,
        ranked=True,
    ),
    "scored": Adapter(
        "a prompt, one answer and its score, several rows a prompt",
        scored,
        ("prompt", "response", "score"),
        is_scored,
        assemble=by_prompt,
        ranked=True,
    ),
    "oasst": Adapter(
        "messages of conversation trees with ranked replies (OpenAssistant)",
        oasst,
        ("message_id", "parent_id", "text", "role"),
        is_oasst,
        assemble=by_tree,
        ranked=True,
    ),
}
