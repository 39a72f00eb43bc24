"""Adapters for public preference data sets (HelpSteer, SHP, PKU-SafeRLHF, TL;DR, WebGPT, Chatbot Arena).

Column names are those of the data set cards on the Hugging Face hub.
"""

import re
from typing import Any

from dpo_core.data.layouts.adapter import Adapter
from dpo_core.data.layouts.fields import (
    Fault,
    PairFields,
    Row,
    has,
    is_empty,
    number,
    objects,
    required_number,
    text,
    type_of,
)
from dpo_core.data.layouts.messages import (
    ROLES,
    Messages,
    check_answer,
    common_turns,
    read_messages,
    read_prompt,
    read_tools,
    write_answers,
)
from dpo_core.data.layouts.structured import parse_source


def _better(
    row: Row, prompt: Any, answers: tuple[Any, Any], better: int, margin: float | None = None
) -> PairFields:
    """The pair of two text answers, of which number `better` (0 or 1) is chosen."""
    tools = read_tools(row)
    canonical, chat = read_prompt(row, prompt, tools=tools)
    return PairFields(canonical, chat, answers[better], answers[1 - better], tools=tools, margin=margin)


def _side(row: Row, name: str) -> int:
    """A choice of 0 or 1, also as text or as a truth value."""
    value = row.get(name)
    side = float(value) if isinstance(value, bool) else required_number(row, name)
    if side not in (0, 1):
        raise Fault(f"{name} is {value!r}, neither 0 nor 1")
    return int(side)


# --- two answers and a preference -------------------------------------------------------------------------

# HelpSteer2 writes the turns of a conversation into one text.
_EXTRA_ID = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def _helpsteer_turns(prompt: str) -> str | Messages:
    parts = _EXTRA_ID.split(prompt)
    if len(parts) == 1:
        return prompt
    turns: Messages = [{"role": "user", "content": parts[0]}] if parts[0].strip() else []
    turns += [
        {"role": ROLES[role.lower()], "content": content}
        for role, content in zip(parts[1::2], parts[2::2], strict=True)
    ]
    if turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()  # the start of the answer
    return turns


def helpsteer2(row: Row) -> PairFields | None:
    """preference_strength from -3 (response_1 is much better) to 3 (response_2); 0 is a tie."""
    strength = required_number(row, "preference_strength")
    answers = text(row, "response_1"), text(row, "response_2")
    if strength == 0:
        return None
    prompt = _helpsteer_turns(text(row, "prompt"))
    return _better(row, prompt, answers, int(strength > 0), abs(strength))


def helpsteer3(row: Row) -> PairFields | None:
    """overall_preference from -3 (response1 is much better) to 3 (response2); 0 is a tie."""
    preference = required_number(row, "overall_preference")
    answers = text(row, "response1"), text(row, "response2")
    if preference == 0:
        return None
    return _better(row, row.get("context"), answers, int(preference > 0), abs(preference))


def shp(row: Row) -> PairFields:
    """A post (history) and two comments; labels is 1 if A was preferred."""
    scores = [number(row, f"score_{side}") for side in "AB"]
    better = 1 - _side(row, "labels")
    margin = None if scores[0] is None or scores[1] is None else (scores[0] - scores[1]) * (1 - 2 * better)
    answers = text(row, "human_ref_A"), text(row, "human_ref_B")
    return PairFields(text(row, "history"), False, answers[better], answers[1 - better], margin=margin)


def _pku(row: Row, verdict: str) -> PairFields:
    """PKU-SafeRLHF by helpfulness or by harmlessness."""
    answers = text(row, "response_0"), text(row, "response_1")
    return _better(row, text(row, "prompt"), answers, _side(row, verdict))


def summaries(row: Row) -> PairFields:
    """Two summaries of a Reddit post or an article, written as a prompt that ends in "TL;DR:"."""
    info = row.get("info")
    if not isinstance(info, dict):
        raise Fault(f"info is a {type_of(info)}, not an object")
    two = objects(row.get("summaries"), "summaries")
    if len(two) != 2:
        raise Fault(f"summaries holds {len(two)} summaries, not two")
    if is_empty(info.get("post")):
        prompt = f"{text(info, 'article')}\n\nTL;DR:"
    else:
        head = [f"SUBREDDIT: r/{info['subreddit']}"] if info.get("subreddit") else []
        head += [f"TITLE: {info['title']}"] if info.get("title") else []
        prompt = "\n\n".join([*head, f"POST: {text(info, 'post')}", "TL;DR:"])
    answers = text(two[0], "text"), text(two[1], "text")
    return _better(row, prompt, answers, _side(row, "choice"))


def webgpt(row: Row) -> PairFields | None:
    """Two answers to a question with their scores; equal scores are a tie."""
    question = row.get("question")
    prompt = text(question, "full_text") if isinstance(question, dict) else text(row, "question")
    scores = required_number(row, "score_0"), required_number(row, "score_1")
    answers = text(row, "answer_0"), text(row, "answer_1")
    if scores[0] == scores[1]:
        return None
    return _better(row, prompt, answers, int(scores[1] > scores[0]), abs(scores[0] - scores[1]))


# --- Chatbot Arena ----------------------------------------------------------------------------------------


def is_arena(row: Row) -> bool:
    """Battles with a `winner`, or Kaggle's table with one column per outcome."""
    return has(row, "conversation_a", "conversation_b", "winner") or has(
        row, "prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"
    )


def arena(row: Row) -> PairFields | None:
    """The winner's conversation is chosen; None for ties. The answer is the part after the common start."""
    sides: list[Messages] = []
    if row.get("conversation_a") is not None:
        better = _winner(row)
        sides = [read_messages(row, row.get(f"conversation_{s}"), f"conversation_{s}") for s in "ab"]
        turn = number(row, "turn") if not is_empty(row.get("judge")) else None
        if turn is not None:  # MT-bench: only the turns up to this one were judged
            sides = [_until_turn(turns, int(turn)) for turns in sides]
    else:
        better = next((i for i, s in enumerate("ab") if _side(row, f"winner_model_{s}")), None)
        questions = _texts(row, "prompt")
        for side in "ab":
            replies = _texts(row, f"response_{side}")
            if len(replies) != len(questions):
                raise Fault(f"prompt and response_{side} differ in their number of turns")
            turns: Messages = []
            for question, reply in zip(questions, replies, strict=True):
                turns += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
            sides.append(turns)
    if better is None:
        return None
    at = common_turns(*sides)
    for turns, name in zip(sides, "ab", strict=True):
        check_answer(turns[at:], f"conversation_{name}")
    tools = read_tools(row)
    (a, b), answer_chat = write_answers(sides[0][at:], sides[1][at:])
    chosen, rejected = (b, a) if better else (a, b)
    prompt, chat = read_prompt(row, sides[0][:at], "conversation_a", tools)
    return PairFields(prompt, chat, chosen, rejected, tools=tools, answer_chat=answer_chat)


def _winner(row: Row) -> int | None:
    winner = text(row, "winner")
    if winner in ("model_a", "model_b"):
        return int(winner == "model_b")
    if winner.startswith(("tie", "both")):
        return None
    raise Fault(f"winner is {winner[:30]!r}, neither model_a, model_b nor tie")


def _until_turn(turns: Messages, turn: int) -> Messages:
    places = [i for i, message in enumerate(turns) if message["role"] == "assistant"]
    return turns[: places[turn - 1] + 1] if 0 < turn <= len(places) else turns


def _texts(row: Row, name: str) -> list[str]:
    """Kaggle's turns: a JSON list of texts."""
    value = row.get(name)
    texts = parse_source(value) if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise Fault(f"{name} is not a JSON list of texts")
    return texts


FORMATS = {
    "helpsteer2": Adapter(
        "a prompt, response_1, response_2 and preference_strength (HelpSteer2)",
        helpsteer2,
        ("prompt", "response_1", "response_2", "preference_strength"),
    ),
    "helpsteer3": Adapter(
        "a context, response1, response2 and overall_preference (HelpSteer3)",
        helpsteer3,
        ("context", "response1", "response2", "overall_preference"),
    ),
    "shp": Adapter(
        "a history, human_ref_A, human_ref_B and labels (SHP)",
        shp,
        ("history", "human_ref_A", "human_ref_B", "labels"),
    ),
    "pku-saferlhf": Adapter(
        "a prompt, response_0, response_1 and better_response_id (PKU-SafeRLHF)",
        lambda row: _pku(row, "better_response_id"),
        ("prompt", "response_0", "response_1", "better_response_id"),
        note="the more helpful response was chosen; data.format=pku-saferlhf-safer chooses the safer one",
    ),
    "pku-saferlhf-safer": Adapter(
        "the same rows, with safer_response_id as the preference",
        lambda row: _pku(row, "safer_response_id"),
        ("prompt", "response_0", "response_1", "safer_response_id"),
        lambda row: (
            has(row, "prompt", "response_0", "response_1", "safer_response_id")
            and row.get("better_response_id") is None
        ),
    ),
    "summaries": Adapter(
        "info with a post or article, two summaries and a choice (TL;DR comparisons)",
        summaries,
        ("info", "summaries", "choice"),
    ),
    "webgpt": Adapter(
        "a question, answer_0, answer_1, score_0 and score_1 (WebGPT comparisons)",
        webgpt,
        ("question", "answer_0", "answer_1", "score_0", "score_1"),
    ),
    "arena": Adapter(
        "conversations or responses of two models and the winner (Chatbot Arena)",
        arena,
        ("conversation_a", "conversation_b", "winner"),
        is_arena,
    ),
}
