"""The table of formats, and how the format of rows is recognised."""

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_core.data.config import Format
from dpo_core.data.layouts import common as usual
from dpo_core.data.layouts import public, rankings
from dpo_core.data.layouts.fields import Fault, Kind, Ranked, Row, has, type_of
from dpo_core.errors import DataError

SAMPLE_ROWS = 100
Assemble = Callable[[list[tuple[int, Any]], Counter[str]], Iterable[Ranked]]


@dataclass(frozen=True)
class Adapter:
    """One format: what its rows become, how they look, and the function that converts one."""

    kind: Kind
    looks: str
    fits: Callable[[Row], bool]
    convert: Callable[[Row], Any]
    columns: tuple[str, ...] = ()
    """The columns that make the format, for saying what rows come near to."""
    assemble: Assemble | None = None
    """Where an answer stands in a row of its own: makes ranked lists of what `convert` gave for all rows."""
    note: str = ""
    """A choice that the format made, said after reading."""
    ranked: bool = False
    """Whether `data.pairs` is read."""


ADAPTERS: dict[Format, Adapter] = {
    "hh": Adapter("pairs", "chosen and rejected are Human/Assistant transcripts", usual.is_hh, usual.hh),
    "prompt-pairs": Adapter(
        "pairs",
        "a prompt (or the turns inside the answers) with chosen and rejected",
        usual.is_prompt_pairs,
        usual.prompt_pairs,
        ("prompt", "chosen", "rejected"),
    ),
    "sharegpt": Adapter(
        "pairs",
        "conversations with a chosen and a rejected message",
        lambda row: has(row, "conversations", "chosen", "rejected"),
        usual.sharegpt,
        ("conversations", "chosen", "rejected"),
    ),
    "pandalm": Adapter(
        "pairs",
        "an instruction, response1 and response2, and annotators' votes",
        lambda row: has(row, "instruction", "response1", "response2", "annotator1"),
        usual.pandalm,
        ("instruction", "response1", "response2", "annotator1"),
    ),
    "stackexchange": Adapter(
        "pairs",
        "a question with response_j preferred to response_k",
        lambda row: has(row, "question", "response_j", "response_k"),
        usual.stackexchange,
        ("question", "response_j", "response_k"),
    ),
    "kto": Adapter(
        "unpaired",
        "one answer a row with a true/false label",
        usual.is_kto,
        usual.kto,
        ("prompt", "completion", "label"),
    ),
    "prompts": Adapter("prompts", "a prompt or text and no answer", usual.is_prompts, usual.prompts),
    "ranked": Adapter(
        "pairs",
        "a prompt with a list of answers, each with a score or a rank",
        rankings.is_ranked,
        rankings.ranked,
        ("prompt", "answers"),
        ranked=True,
    ),
    "scored": Adapter(
        "pairs",
        "a prompt, one answer and its score, several rows a prompt",
        rankings.is_scored,
        rankings.scored,
        ("prompt", "response", "score"),
        assemble=rankings.by_prompt,
        ranked=True,
    ),
    "oasst": Adapter(
        "pairs",
        "messages of conversation trees with ranked replies (OpenAssistant)",
        rankings.is_oasst,
        rankings.oasst,
        ("message_id", "parent_id", "text", "role"),
        assemble=rankings.by_tree,
        ranked=True,
    ),
    "helpsteer2": Adapter(
        "pairs",
        "a prompt, response_1, response_2 and preference_strength (HelpSteer2)",
        lambda row: has(row, "prompt", "response_1", "response_2", "preference_strength"),
        public.helpsteer2,
        ("prompt", "response_1", "response_2", "preference_strength"),
    ),
    "helpsteer3": Adapter(
        "pairs",
        "a context, response1, response2 and overall_preference (HelpSteer3)",
        lambda row: has(row, "context", "response1", "response2", "overall_preference"),
        public.helpsteer3,
        ("context", "response1", "response2", "overall_preference"),
    ),
    "shp": Adapter(
        "pairs",
        "a history, human_ref_A, human_ref_B and labels (SHP)",
        lambda row: has(row, "history", "human_ref_A", "human_ref_B", "labels"),
        public.shp,
        ("history", "human_ref_A", "human_ref_B", "labels"),
    ),
    "pku-saferlhf": Adapter(
        "pairs",
        "a prompt, response_0, response_1 and better_response_id (PKU-SafeRLHF)",
        lambda row: has(row, "prompt", "response_0", "response_1", "better_response_id"),
        public.pku_better,
        ("prompt", "response_0", "response_1", "better_response_id"),
        note="the more helpful response was chosen; data.format=pku-saferlhf-safer chooses the safer one",
    ),
    "pku-saferlhf-safer": Adapter(
        "pairs",
        "the same rows, of which safer_response_id decides",
        lambda row: (
            has(row, "prompt", "response_0", "response_1", "safer_response_id")
            and row.get("better_response_id") is None
        ),
        public.pku_safer,
        ("prompt", "response_0", "response_1", "safer_response_id"),
    ),
    "summaries": Adapter(
        "pairs",
        "info with a post or article, two summaries and a choice (TL;DR comparisons)",
        lambda row: has(row, "info", "summaries", "choice"),
        public.summaries,
        ("info", "summaries", "choice"),
    ),
    "webgpt": Adapter(
        "pairs",
        "a question, answer_0, answer_1, score_0 and score_1 (WebGPT comparisons)",
        lambda row: has(row, "question", "answer_0", "answer_1", "score_0", "score_1"),
        public.webgpt,
        ("question", "answer_0", "answer_1", "score_0", "score_1"),
    ),
    "arena": Adapter(
        "pairs",
        "conversations or responses of two models and the winner (Chatbot Arena)",
        public.is_arena,
        public.arena,
        ("conversation_a", "conversation_b", "winner"),
    ),
}


def fits(adapter: Adapter, row: Row) -> bool:
    """Whether a row looks like a format; one odd row ends nothing."""
    try:
        return adapter.fits(row)
    except Exception:
        return False


def recognise(rows: Sequence[Row]) -> tuple[Format, str]:
    """The one format that at least half of the first rows fit, and a sentence that says why.

    Raises:
        DataError: no format fits, or several do.
    """
    sample = rows[:SAMPLE_ROWS]
    fitting = {
        name: count
        for name, adapter in ADAPTERS.items()
        if 2 * (count := sum(fits(adapter, row) for row in sample)) >= len(sample) > 0
    }
    if len(fitting) == 1:
        ((name, count),) = fitting.items()
        return name, f"{count} of the first {len(sample)} rows are {name}: {ADAPTERS[name].looks}"
    fields: dict[str, set[str]] = {}
    for row in sample:
        for key, value in row.items():
            fields.setdefault(str(key), set()).add("missing" if value is None else type_of(value))
    seen = ", ".join(f"{key} ({' or '.join(sorted(types))})" for key, types in fields.items())
    if fitting:
        many = "; ".join(f"{name}: {ADAPTERS[name].looks}" for name in fitting)
        raise DataError(
            f"the rows fit several formats ({many}); the fields are {seen}",
            f"Set data.format to the one that is meant: {', '.join(fitting)}",
        )
    near = _nearest(sample, list(fields))
    alone = any(isinstance(row.get(name), str | list) for row in sample for name in ("prompt", "text"))
    every = "; ".join(
        f"{name}: {ADAPTERS[name].looks}" for name in sorted(ADAPTERS, key=lambda n: n != near[0])
    )
    raise DataError(
        f"the rows fit no known format{near[1]}; the fields are {seen}",
        "Rename the fields or name them in data.columns={prompt: …, chosen: …, rejected: …}, or set "
        f"data.format to one of these ({every})"
        + ("; data.format=prompts reads the prompts alone" if alone else ""),
    )


def _nearest(sample: Sequence[Row], fields: list[str]) -> tuple[Format | None, str]:
    """The format that most of the fields belong to, and what keeps the rows from being it."""
    best: Format | None = None
    share, absent = 0.0, [""]
    for name, adapter in ADAPTERS.items():
        missing = [column for column in adapter.columns if column not in fields]
        found = 1 - len(missing) / len(adapter.columns) if adapter.columns else 0.0
        if found > share:
            best, share, absent = name, found, missing
    if best is None or share < 0.6:
        return None, ""
    why = f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing" if absent else ""
    for column in absent:
        near = difflib.get_close_matches(column, fields, n=1, cutoff=0.75)
        why += f" (is {near[0]} meant for it?)" if near else ""
    if not absent:
        why = next(
            filter(None, (_fault(ADAPTERS[best], row) for row in sample)), "its fields hold other types"
        )
    return best, f" (they look like {best}, but {why})"


def _fault(adapter: Adapter, row: Row) -> str:
    try:
        adapter.convert(row)
    except Fault as fault:
        return str(fault)
    except Exception as error:
        return f"a row cannot be read ({type(error).__name__})"
    return ""
