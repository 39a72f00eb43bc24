"""Adapters for common layouts: pairs as text or conversations, votes, labelled answers, prompts."""

from typing import Any

from dpo_core.data.layouts.adapter import Adapter
from dpo_core.data.layouts.fields import (
    Fault,
    PairFields,
    PromptFields,
    Row,
    Unpaired,
    flag,
    has,
    is_empty,
    is_flag,
    number,
    remark,
    text,
)
from dpo_core.data.layouts.messages import (
    check_answer,
    common_turns,
    read_answer,
    read_messages,
    read_prompt,
    read_tools,
    write_answers,
)

ROLE_COLUMNS = {"role", "from", "speaker"}
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def hh(row: Row) -> PairFields:
    """Transcripts. The prompt is the text up to and including the last "Assistant:", equal in both."""
    chosen, rejected = text(row, "chosen"), text(row, "rejected")
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
    return PairFields(prompt, False, chosen[ends[0] :], rejected[ends[1] :])


def prompt_pairs(row: Row) -> PairFields:
    """`{prompt, chosen, rejected}` as strings or messages, whose first turns may be the prompt; optionally
    with votes, scores, a system text, earlier turns and tools."""
    return _prompt_pair(row)._replace(agreement=_agreement(row), margin=_margin(row))


def _agreement(row: Row) -> float | None:
    """The share of votes for the chosen answer, if given; in CSV files it is text."""
    try:
        share = number(row, "agreement")
    except Fault:
        share = -1.0
    if share is not None and not 0 <= share <= 1:
        raise Fault(f"agreement is {str(row['agreement'])[:20]!r}, not a share of votes from 0 to 1")
    return share


# Names of the two answers' scores in public data sets.
_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_reward", "rejected_reward"),
)


def _margin(row: Row) -> float | None:
    """The margin of the chosen answer, from `margin` or from the two scores."""
    margin = number(row, "margin")
    if margin is None:
        for names in (pair for pair in _SCORES if pair[0] in row):
            better, worse = (number(row, name) for name in names)
            if better is not None and worse is not None:
                margin = better - worse
                break
    if margin is not None and margin < 0:
        remark(row, "the chosen answer has the lower score")
    return margin


def _prompt_pair(row: Row) -> PairFields:
    name, value = _prompt_column(row)
    chosen, rejected, tools = row.get("chosen"), row.get("rejected"), read_tools(row)
    if not isinstance(chosen, list | dict) and not isinstance(rejected, list | dict):
        chosen, rejected = text(row, "chosen"), text(row, "rejected")
        if not isinstance(value, list | dict):
            value = _with_steps(row, text({"prompt": value}, "prompt"))
            if HUMAN in value and chosen.startswith(value) and rejected.startswith(value):
                # Transcripts that repeat their prompt: the answer follows it.
                chosen, rejected = chosen[len(value) :], rejected[len(value) :]
        prompt, chat = read_prompt(row, value, name, tools)
        return PairFields(prompt, chat, chosen, rejected, tools=tools)
    better, worse = read_messages(row, chosen, "chosen"), read_messages(row, rejected, "rejected")
    turns = None if value is None or isinstance(value, str) else read_messages(row, value, name)
    at = _start_of_answers(better, worse, turns)
    before = better[:at]
    if isinstance(value, str):
        if before and not any(m["role"] == "user" and m["content"].strip() == value.strip() for m in before):
            raise Fault("prompt is not among the turns before the answers")
        before = before or [{"role": "user", "content": value}]
    elif turns is not None:
        if before and before != turns:
            raise Fault("the turns before the answers are not those of prompt")
        before = turns
    for side, turns_of_side in (("chosen", better[at:]), ("rejected", worse[at:])):
        check_answer(turns_of_side, side)
    if not before:
        raise Fault("the prompt has no turn of a user")
    (good, bad), answer_chat = write_answers(better[at:], worse[at:])
    prompt, _ = read_prompt(row, before, name, tools)
    return PairFields(prompt, True, good, bad, tools=tools, answer_chat=answer_chat)


def _start_of_answers(better: list[Any], worse: list[Any], prompt: list[Any] | None) -> int:
    """The index in both conversations at which the answers begin; 0 if they contain only answers."""
    for turns, name in ((better, "chosen"), (worse, "rejected")):
        if turns[-1]["role"] != "assistant":
            raise Fault(f"{name} ends with a turn of the {turns[-1]['role']}, not of the assistant")
    if prompt is not None and better[: len(prompt)] == prompt == worse[: len(prompt)]:
        return len(prompt)
    if better[0]["role"] == worse[0]["role"] == "assistant" and (prompt is not None or len(better) > 1):
        return 0
    return common_turns(better, worse)


def _prompt_column(row: Row) -> tuple[str, Any]:
    """Column name and value of the prompt: prompt, instruction (+ input), question, or input."""
    if row.get("prompt") is not None:
        return "prompt", row["prompt"]
    if isinstance(row.get("instruction"), str):
        return "instruction", _instruction(row)
    return ("question", row["question"]) if row.get("question") is not None else ("prompt", row.get("input"))


def _instruction(row: Row) -> str:
    extra = row.get("input")
    return text(row, "instruction") + (f"\n\n{text(row, 'input')}" if extra not in (None, "") else "")


def _with_steps(row: Row, prompt: str) -> str:
    """Step-DPO: the steps before the compared one follow the question."""
    steps = row.get("initial_reason_steps")
    return prompt if is_empty(steps) else f"{prompt}\n\n{text(row, 'initial_reason_steps')}"


def sharegpt(row: Row) -> PairFields:
    """LLaMA-Factory's pairs: `conversations` is the prompt, `chosen` and `rejected` are one message each."""
    tools = read_tools(row)
    prompt, _ = read_prompt(row, read_messages(row, row.get("conversations"), "conversations"), tools=tools)
    sides = [read_answer(row, row.get(name), name) for name in ("chosen", "rejected")]
    (good, bad), answer_chat = write_answers(*sides)
    return PairFields(prompt, True, good, bad, tools=tools, answer_chat=answer_chat, margin=_margin(row))


def pandalm(row: Row) -> PairFields | None:
    """Two responses with annotators' votes (1, 2, or 0 for a tie); None without a majority."""
    votes = []
    for name in sorted(key for key in row if isinstance(key, str) and key.startswith("annotator")):
        vote = str(row[name]).strip().removesuffix(".0")
        if vote not in ("0", "1", "2"):
            raise Fault(f"{name} is not a vote 0, 1 or 2")
        votes.append(int(vote))
    if not votes:
        raise Fault("the annotators' votes are missing")
    better = next((side for side in (1, 2) if 2 * votes.count(side) > len(votes)), None)
    if better is None:
        return None
    chosen, rejected = text(row, f"response{better}"), text(row, f"response{3 - better}")
    return PairFields(_instruction(row), False, chosen, rejected, agreement=votes.count(better) / len(votes))


def stackexchange(row: Row) -> PairFields:
    """A question with a better-voted answer (j) and a worse one (k)."""
    return PairFields(text(row, "question"), False, text(row, "response_j"), text(row, "response_k"))


def kto(row: Row) -> Unpaired:
    """`{messages, label}` (or conversations) or `{prompt, completion, label}`, these strings or messages."""
    label, tools = flag(row, "label"), read_tools(row)
    name = next((name for name in ("messages", "conversations") if row.get(name) is not None), "")
    if name:
        turns = read_messages(row, row[name], name)
        before, answer = turns[:-1], turns[-1:]
        check_answer(answer, name)
        if not before:
            raise Fault("the prompt has no turn of a user")
        prompt: Any = before
    else:
        name, prompt = _prompt_column(row)
        if not isinstance(prompt, list | dict):
            prompt = text({"prompt": prompt}, "prompt")
        value = row.get("completion")
        if not isinstance(value, list | dict):
            text(row, "completion")
        elif isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        answer = read_answer(row, value, "completion")
    canonical, chat = read_prompt(row, prompt, name, tools)
    (completion,), answer_chat = write_answers(answer)
    return Unpaired(canonical, chat, completion, label, tools=tools, answer_chat=answer_chat)


def prompts(row: Row) -> PromptFields:
    """`{prompt}` as a string or messages, or `{text}`."""
    tools = read_tools(row)
    if isinstance(row.get("prompt"), list | dict):
        return PromptFields(*read_prompt(row, row["prompt"], "prompt", tools), tools=tools)
    value = text(row, "prompt" if row.get("prompt") is not None else "text")
    return PromptFields(*read_prompt(row, value, "prompt", tools), tools=tools)


# --- recognition of rows ------------------------------------------------------------------------------------


def is_hh(row: Row) -> bool:
    """Two transcripts without a separate prompt."""
    both = row.get("chosen"), row.get("rejected")
    return row.get("prompt") is None and all(isinstance(t, str) and ASSISTANT in t for t in both)


def is_prompt_pairs(row: Row) -> bool:
    """Two answers with a prompt, either separate or inside them."""
    if not has(row, "chosen", "rejected") or row.get("conversations") is not None:
        return False
    if is_hh(row):
        return False
    return _prompt_column(row)[1] is not None or all(
        isinstance(row[n], list | dict) for n in ("chosen", "rejected")
    )


def is_kto(row: Row) -> bool:
    """One answer with a truth value."""
    conversation = has(row, "messages") or (has(row, "conversations") and row.get("chosen") is None)
    answered = conversation or (has(row, "completion") and _prompt_column(row)[1] is not None)
    return is_flag(row.get("label")) and answered


# Columns with these prefixes contain answers, or judgements of answers.
_ANSWERS = (
    "answer", "chosen", "rejected", "completion", "messages", "conversation", "response", "label_confidence",
    "output", "generation", "candidate", "summaries", "replies", "rank", "winner", "score",
)  # fmt: skip


def is_turns(value: object) -> bool:
    """Whether an object is a message, or messages in the form of Parquet's nested columns."""
    return isinstance(value, dict) and bool({"role", "from"} & value.keys())


def is_prompts(row: Row) -> bool:
    """A prompt or text, without answers or judgements of answers."""
    answered = any(not is_empty(row[key]) and str(key).lower().startswith(_ANSWERS) for key in row)
    tree = isinstance(row.get("prompt"), dict) and "replies" in row["prompt"]
    # A message of a tree or of a log: its speaker may be the assistant.
    if answered or tree or "parent_id" in row or ROLE_COLUMNS & row.keys():
        return False
    if has(row, "tag", "include") or has(row, "file_path", "human_preference"):  # of images
        return False
    prompt = row.get("prompt")
    return isinstance(prompt, str | list) or is_turns(prompt) or isinstance(row.get("text"), str)


FORMATS = {
    "hh": Adapter("chosen and rejected are Human/Assistant transcripts", hh, fits=is_hh),
    "prompt-pairs": Adapter(
        "a prompt (or the turns inside the answers) with chosen and rejected",
        prompt_pairs,
        ("prompt", "chosen", "rejected"),
        is_prompt_pairs,
    ),
    "sharegpt": Adapter(
        "conversations with a chosen and a rejected message",
        sharegpt,
        ("conversations", "chosen", "rejected"),
    ),
    "pandalm": Adapter(
        "an instruction, response1 and response2, and annotators' votes",
        pandalm,
        ("instruction", "response1", "response2", "annotator1"),
    ),
    "stackexchange": Adapter(
        "a question with response_j preferred to response_k",
        stackexchange,
        ("question", "response_j", "response_k"),
    ),
    "kto": Adapter(
        "one answer a row with a true/false label", kto, ("prompt", "completion", "label"), is_kto, "unpaired"
    ),
    "prompts": Adapter("a prompt or text and no answer", prompts, fits=is_prompts, kind="prompts"),
}
