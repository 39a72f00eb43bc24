"""Computes one feature column per rule of the data gate; the suites are expectations on these columns.

A row-level column is True if the row breaks its rule; the two token columns are floats (0, 1, NaN = not
checked). Texts are processed in slices: memory stays near the size of the frame."""

import json
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from dpo_core.data.split import prompt_key
from dpo_core.images.files import names_image
from expectations.rules import Subject

if TYPE_CHECKING:
    from dpo_core.data.tokens.tokenise import Tokenise

TEXTS: dict[Subject, list[str]] = {
    "pairs": ["prompt", "chosen", "rejected"],
    "unpaired": ["prompt", "completion"],
    "prompts": ["prompt"],
}
SLICE = 50_000

# Control tokens of well-known chat templates (ChatML, Llama 2 and 3, Gemma, Mistral, GPT-2, Phi, DeepSeek).
TEMPLATE_TOKENS: tuple[str, ...] = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>",
    "<|start_header_id|>", "<|end_header_id|>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>",
    "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|end|>", "<|return|>", "<|channel|>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
)  # fmt: skip

_CONTROL = r"[\x00-\x08\x0B\x0C\x0E-\x1F\x7F-\x{9F}\x{FFFD}]"
# The same as JSON escapes, after an even number of backslashes (an odd one would be an escaped backslash).
_CONTROL_JSON = (
    r"(?:^|[^\\])(?:\\\\)*\\(?:[bf]|u(?:00(?:0[0-8bBcCeEfF]|1[0-9a-fA-F]|7[fF]|[89][0-9a-fA-F])|[fF]{3}[dD]))"
)
# A message whose content is not only whitespace. Quotes inside contents are escaped, so text cannot imitate
# it.
_CHAT_CONTENT = r'"content": ?"(?:\s|\\[nrt])*(?:[^"\s\\]|\\[^nrt])'
_CONTENT_KEY = '"content":"'
# A chat template may add its own system turn, whose tokens are not in the row's bytes.
_TEMPLATE_SLACK = 128

_Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Tokenisation:
    """The tokenizer, its chat template and the token budget, as far as the gate knows them."""

    tokens: "Tokenise | None" = None
    """With `max_length` it enables the two token rules."""
    max_length: int | None = None
    """Maximum tokens of prompt and answer together."""
    max_prompt_length: int | None = None
    """Maximum tokens of the prompt if both do not fit; for prompts, the budget itself."""
    special_tokens: Sequence[str] = ()
    """The tokenizer's own special tokens, which no text may contain."""
    template_tokens: Sequence[str] = ()
    """Other tokens that its chat template writes; a text that contains one causes a warning."""
    turn_markers: Sequence[str] = ()
    """Words that the template writes around turns, which no conversation may contain."""
    wraps: bool = False
    """Whether text prompts become user turns."""
    frame: int = _TEMPLATE_SLACK
    """Maximum number of tokens that the template adds to the messages."""

    @classmethod
    def of(cls, tokenise: "Tokenise") -> "Tokenisation":
        """With everything that the tokenizer and its template say."""
        config, added = tokenise.config, tokenise.tokenizer.added_tokens_decoder.values()
        plain = cls(
            tokenise,
            config.max_length,
            config.max_prompt_length,
            special_tokens=sorted(t.content for t in added if t.special),
        )
        if not tokenise.writes_template:
            return plain
        form = tokenise.chat_format()
        frame = len(form.write([{"role": "user", "content": "a"}], None, opened=True))
        return replace(
            plain,
            template_tokens=sorted(t for t in form.markers if t in form.template.source),
            turn_markers=sorted(form.role_markers),
            wraps=config.template == "chat",
            frame=frame + _TEMPLATE_SLACK,
        )

    def limit(self, subject: Subject) -> int | None:
        """Number of tokens above which a row of `subject` is cut; None = no limit."""
        if subject != "prompts":
            return self.max_length
        return self.max_prompt_length if self.max_prompt_length is not None else self.max_length


@dataclass(frozen=True)
class Features:
    """`flags`: the columns that the suites check, indexed by source row number. `keys`: hashes for comparing
    rows. `maybe_over`, `maybe_equal`: rows whose token rules cannot be decided from bytes alone."""

    flags: pd.DataFrame
    keys: pd.DataFrame
    maybe_over: _Array
    maybe_equal: _Array


def _as_text(series: pd.Series) -> tuple[list[str], _Array]:
    """Python strings ("" in place of other values), and which values were not strings."""
    values = series.to_list()
    foreign = np.fromiter((type(v) is not str for v in values), bool, len(values))
    if foreign.any():
        values = [v if type(v) is str else "" for v in values]
    return values, foreign


def _arrow(texts: list[str]) -> Any:
    try:
        return pa.array(texts, type=pa.large_string())
    except UnicodeEncodeError:  # lone surrogates become U+FFFD, which the control-character rule detects
        replaced = [t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in texts]
        return pa.array(replaced, type=pa.large_string())


def _matches(array: Any, pattern: str) -> _Array:
    return pc.match_substring_regex(array, pattern).to_numpy(zero_copy_only=False)


def _hash(texts: Iterable[str]) -> _Array:
    """64-bit hashes; the probability of a collision among a million different texts is 3e-8."""
    values = np.array([t.encode("utf-8", "surrogatepass") for t in texts] or [b""], dtype=object)
    return pd.util.hash_array(values, categorize=False)[: len(values)]


def _mix(first: _Array, *others: _Array) -> _Array:
    """One hash of several, order-sensitive: a sum with odd multipliers, modulo 2^64."""
    total = first.copy()
    for other, odd in zip(others, (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F), strict=False):
        total = total * np.uint64(0x165667B19E3779F9) + other * np.uint64(odd)
    return total


def tokens_pattern(tokens: Sequence[str]) -> str | None:
    """A regular expression for literal tokens, as plain text and as JSON escapes; None if there are none.

    Tokens shorter than three characters (some tokenizers pad with "!") are ordinary text and are skipped.
    """
    forms = {form for t in tokens if len(t.strip()) > 2 for form in (t, json.dumps(t)[1:-1])}
    return "|".join(re.escape(form) for form in sorted(forms)) or None


def _repeats(prompt: str, chat: bool, answers: tuple[str, ...], least: int) -> bool:
    """Whether an answer begins with the prompt; for a chat, with its first or last message."""
    if not chat:
        start = prompt.strip()
        return len(start) >= least and any(a.startswith(start) for a in answers)
    # Most rows differ within the first letters of a message; only the others need parsing.
    for at in (prompt.find(_CONTENT_KEY), prompt.rfind(_CONTENT_KEY)):
        head = prompt[at + len(_CONTENT_KEY) :][:8]
        unsure = at < 0 or "\\" in head or '"' in head or head != head.lstrip()
        if unsure or any(a.startswith(head) for a in answers):
            break
    else:
        return False
    try:
        contents = [str(turn["content"]).strip() for turn in json.loads(prompt)]
    except (ValueError, KeyError, TypeError):
        return False
    starts = [c for c in {*contents[:1], *contents[-1:]} if len(c) >= least]
    return any(a.startswith(s) for a in answers for s in starts)


def _normal(prompt: str, chat: bool, usable: bool) -> str:
    """The splitter's prompt key, so that splitting and leak detection agree on equal prompts."""
    if not usable:
        return ""
    try:
        return prompt_key(prompt, chat)
    except (ValueError, KeyError, TypeError):  # a chat prompt that is not the JSON of messages
        return prompt_key(prompt)


def _equal_start(chosen: str, rejected: str, kept: int) -> bool:
    """Whether two answers can keep the same `kept` tokens: each token spells at least one byte of text."""
    if chosen[: kept // 4] != rejected[: kept // 4]:  # a character has at most four bytes
        return False
    return (
        chosen[:kept].encode("utf-8", "replace")[:kept] == rejected[:kept].encode("utf-8", "replace")[:kept]
    )


def _tools_bound(arrays: dict[str, Any]) -> Any:
    """Upper bound of the tokens of tools, which templates rewrite and precede by instructions."""
    if "tools" not in arrays:
        return 0
    length = pc.binary_length(arrays["tools"]).to_numpy(zero_copy_only=False)
    return np.where(length > 0, 2 * length + 2000, 0)


@dataclass(frozen=True)
class _Texts:
    """The texts of a slice, and what all features read of them."""

    texts: dict[str, list[str]]
    bare: dict[str, list[str]]
    """Without white space around them."""
    full: dict[str, _Array]
    """Which are not empty."""
    size: dict[str, _Array]
    """Their bytes."""
    arrays: dict[str, Any]
    chat: _Array
    fault: _Array
    foreign: _Array
    """Which rows without a fault have something that is not a string in a text column."""

    @property
    def usable(self) -> _Array:
        return ~self.fault & ~self.foreign

    @classmethod
    def of(cls, part: pd.DataFrame, subject: Subject) -> "_Texts":
        texts: dict[str, list[str]] = {}
        foreign = np.zeros(len(part), dtype=bool)
        for column in TEXTS[subject]:
            texts[column], bad = _as_text(part[column])
            foreign |= bad
        chat = part["chat"].to_numpy(dtype=bool)
        arrays = {column: _arrow(values) for column, values in texts.items()}
        bare = {column: [t.strip() for t in values] for column, values in texts.items()}
        full = {column: np.fromiter(map(bool, values), bool, len(part)) for column, values in bare.items()}
        full["prompt"] &= ~chat | _matches(arrays["prompt"], _CHAT_CONTENT)
        size = {
            c: pc.binary_length(a).to_numpy(zero_copy_only=False).astype(np.int64) for c, a in arrays.items()
        }
        if "tools" in part:
            arrays["tools"] = _arrow(_as_text(part["tools"])[0])
        fault = part["fault"].fillna("").astype(str).to_numpy() != ""
        return cls(texts, bare, full, size, arrays, chat, fault, foreign & ~fault)

    def anywhere(self, pattern: str | None) -> _Array:
        """Which usable rows have a text that the pattern matches."""
        hits = np.zeros(len(self.fault), dtype=bool)
        for array in self.arrays.values() if pattern else ():
            hits |= _matches(array, pattern or "")
        return hits & self.usable

    def repeats(self, answers: Iterable[tuple[str, ...]], least: int) -> _Array:
        """Which rows have an answer that begins with the prompt."""
        rows = zip(self.texts["prompt"], self.chat.tolist(), answers, strict=True)
        return np.fromiter((_repeats(*row, least) for row in rows), bool, len(self.fault))


def _slice_features(
    part: pd.DataFrame, subject: Subject, tokenisation: Tokenisation, least: int
) -> dict[str, _Array]:
    """The features of one slice that do not depend on other rows. Names with a leading "_" are internal."""
    t = _Texts.of(part, subject)
    in_turns = t.chat | tokenisation.wraps
    split = part["split"].astype(str).to_numpy()
    unprintable = t.anywhere(_CONTROL)
    if t.chat.any():
        unprintable |= t.chat & t.usable & _matches(t.arrays["prompt"], _CONTROL_JSON)
    normal = map(_normal, t.texts["prompt"], t.chat.tolist(), t.usable.tolist())
    out = {
        "fault": t.fault,
        "type": t.foreign,
        "split": ~np.isin(split, ["train", "eval"]),
        "empty_prompt": t.usable & ~t.full["prompt"],
        "control_characters": unprintable,
        "template_tokens": t.anywhere(tokens_pattern([*TEMPLATE_TOKENS, *tokenisation.template_tokens])),
        "special_tokens": t.anywhere(tokens_pattern(tokenisation.special_tokens))
        | (t.anywhere(tokens_pattern(tokenisation.turn_markers)) & in_turns),
        "_usable": t.usable,
        "_eval": split == "eval",
        "_prompt": _hash(t.bare["prompt"]),
        "_normal": _hash(normal),
        "_maybe_equal": np.zeros(len(part), dtype=bool),
    }
    # Tokens <= bytes (plus a begin or end token and a leading-space piece), so the other rows certainly fit.
    prompt_bound = t.size["prompt"] + np.where(in_turns, tokenisation.frame, 2) + _tools_bound(t.arrays)
    answers = [t.size[name] for name in TEXTS[subject] if name != "prompt"]
    longest = prompt_bound + (np.maximum.reduce(answers) + 2 if answers else 0)
    limit = tokenisation.limit(subject)
    out["_maybe_over"] = over = t.usable & (longest > limit if limit else np.zeros(len(part), dtype=bool))
    if subject == "unpaired":
        out |= _of_unpaired(t, part["label"].to_numpy(dtype=bool), least)
    if subject == "pairs":
        out |= _of_pairs(t, least)
        equal = over & t.full["chosen"] & t.full["rejected"] & ~out["identical"]
        if limit:
            most = tokenisation.max_prompt_length
            kept = np.maximum(limit - np.minimum(prompt_bound, prompt_bound if most is None else most) - 2, 0)
            for at in np.flatnonzero(equal).tolist():
                equal[at] = _equal_start(t.texts["chosen"][at], t.texts["rejected"][at], int(kept[at]))
        out["_maybe_equal"] = equal
    return out


def _of_unpaired(t: _Texts, label: _Array, least: int) -> dict[str, _Array]:
    completion = t.bare["completion"]
    return {
        "empty_completion": t.usable & ~t.full["completion"],
        "prompt_repeated": t.usable & t.full["completion"] & t.repeats(((a,) for a in completion), least),
        "label_balance": np.where(t.usable, label.astype(np.float64), np.nan),
        "_completion": _hash(completion),
        "_label": label.astype(np.uint64),
    }


def _of_pairs(t: _Texts, least: int) -> dict[str, _Array]:
    chosen, rejected = t.bare["chosen"], t.bare["rejected"]
    both = t.usable & t.full["chosen"] & t.full["rejected"]
    same = np.fromiter(map(operator.eq, chosen, rejected), bool, len(both))
    texts = both & ~np.fromiter(map(names_image, chosen), bool, len(both))  # names of images have no length
    lengths = [np.fromiter(map(len, t.texts[c]), np.float64, len(both)) for c in ("chosen", "rejected")]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(lengths[0]) - np.log(lengths[1])
    return {
        "empty_chosen": t.usable & ~t.full["chosen"],
        "empty_rejected": t.usable & ~t.full["rejected"],
        "identical": both & same,
        "prompt_repeated": both & t.repeats(zip(chosen, rejected, strict=True), least),
        "length_skew": np.where(texts, (np.sign(ratio) + 1) / 2, np.nan),
        "length_ratio": np.where(texts, ratio, np.nan),
        "_chosen": _hash(chosen),
        "_rejected": _hash(rejected),
    }


def relations(keys: pd.DataFrame, subject: Subject) -> dict[str, _Array]:
    """The rules that compare rows: duplicates (except the first), contradictions (both), leaks (train
    side)."""
    usable = keys["usable"].to_numpy()
    evals = keys["eval"].to_numpy()
    normal = keys["normal"]
    out = {"leakage": usable & ~evals & normal.isin(normal[usable & evals].unique()).to_numpy()}
    duplicate = np.zeros(len(keys), dtype=bool)
    duplicate[usable] = keys["row_key"][usable].duplicated(keep="first").to_numpy()
    out["duplicate"] = duplicate
    if subject != "prompts":
        ordered = usable & (keys["order_key"] != keys["turned_key"]).to_numpy()
        turned = keys["turned_key"][ordered].unique()
        out["contradiction"] = ordered & keys["order_key"].isin(turned).to_numpy()
    return out


def compute(
    frame: pd.DataFrame,
    subject: Subject,
    *,
    tokenisation: Tokenisation | None = None,
    echo_min_chars: int = 20,
    tick: Callable[[int], None] | None = None,
) -> Features:
    """Features of a frame that passed the schema check.

    Args:
        frame: the canonical columns; its index is ignored, source rows are in `row`.
        tokenisation: without a token budget, no row is a candidate for the token rules.
        echo_min_chars: shortest prompt (or message) that is searched for at the start of an answer.
        tick: called after each slice with the number of rows done.
    """
    tokenisation = tokenisation or Tokenisation()
    parts: dict[str, list[_Array]] = {}
    for start in range(0, max(len(frame), 1), SLICE):
        part = frame.iloc[start : start + SLICE]
        done = _slice_features(part, subject, tokenisation, echo_min_chars)
        for name, values in done.items():
            parts.setdefault(name, []).append(values)
        if tick:
            tick(min(start + SLICE, len(frame)))
    columns = {name: np.concatenate(pieces)[: len(frame)] for name, pieces in parts.items()}
    hidden = {name[1:]: columns.pop(name) for name in list(columns) if name.startswith("_")}
    keys = {name: hidden[name] for name in ("usable", "eval", "normal")}
    if subject == "pairs":
        prompt, chosen, rejected = hidden["prompt"], hidden["chosen"], hidden["rejected"]
        keys["row_key"] = _mix(prompt, chosen, rejected)
        # Uses the splitter's prompt key, so that swapped pairs match across text and chat prompts.
        keys["order_key"] = _mix(hidden["normal"], chosen, rejected)
        keys["turned_key"] = _mix(hidden["normal"], rejected, chosen)
    elif subject == "unpaired":
        prompt, completion, label = hidden["prompt"], hidden["completion"], hidden["label"]
        keys["row_key"] = _mix(prompt, completion, label)
        keys["order_key"] = _mix(hidden["normal"], completion, label)
        keys["turned_key"] = _mix(hidden["normal"], completion, 1 - label)
    else:
        keys["row_key"] = hidden["prompt"]
    table = pd.DataFrame(keys)
    # Leave the index unnamed: for a named index Great Expectations builds a dict for each offending row.
    flags = pd.DataFrame(columns | relations(table, subject), index=pd.Index(frame["row"].to_numpy()))
    return Features(flags, table, hidden["maybe_over"], hidden["maybe_equal"])
