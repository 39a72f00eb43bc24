"""Computes the script and language profile of a data set, and its distance to an earlier profile.

Both are deliberately coarse: they answer "is this still the same mix of languages?", not "which language is
this row in?". Letters are counted by Unicode block; a language is guessed from its most common words.
"""

import json
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import Field, ValidationError

from dpo_core.config import Config
from dpo_core.errors import DataError

# (first code point, script): each range runs to the next entry. "" = not a letter, not counted. Blocks after
# the Unicode block chart; digits, punctuation, spaces and emoji belong to no script.
_BLOCKS: list[tuple[int, str]] = [
    (0x0000, ""), (0x0041, "Latin"), (0x005B, ""), (0x0061, "Latin"), (0x007B, ""), (0x00C0, "Latin"),
    (0x00D7, ""), (0x00D8, "Latin"), (0x00F7, ""), (0x00F8, "Latin"), (0x02B0, ""), (0x0370, "Greek"),
    (0x0400, "Cyrillic"), (0x0530, "Armenian"), (0x0590, "Hebrew"), (0x0600, "Arabic"), (0x0700, "Other"),
    (0x0750, "Arabic"), (0x0780, "Other"), (0x08A0, "Arabic"), (0x0900, "Devanagari"), (0x0980, "Bengali"),
    (0x0A00, "Gurmukhi"), (0x0A80, "Gujarati"), (0x0B00, "Oriya"), (0x0B80, "Tamil"), (0x0C00, "Telugu"),
    (0x0C80, "Kannada"), (0x0D00, "Malayalam"), (0x0D80, "Sinhala"), (0x0E00, "Thai"), (0x0E80, "Lao"),
    (0x0F00, "Tibetan"), (0x1000, "Myanmar"), (0x10A0, "Georgian"), (0x1100, "Hangul"), (0x1200, "Ethiopic"),
    (0x13A0, "Other"), (0x1780, "Khmer"), (0x1800, "Mongolian"), (0x18B0, "Other"), (0x1E00, "Latin"),
    (0x1F00, "Greek"), (0x2000, ""), (0x2C00, "Other"), (0x2C60, "Latin"), (0x2C80, "Other"), (0x2E00, ""),
    (0x2E80, "Han"), (0x2FF0, ""), (0x3040, "Hiragana"), (0x30A0, "Katakana"), (0x3100, "Other"),
    (0x3130, "Hangul"), (0x3190, "Other"), (0x3200, ""), (0x3400, "Han"), (0x4DC0, ""), (0x4E00, "Han"),
    (0xA000, "Other"), (0xA720, "Latin"), (0xA800, "Other"), (0xAC00, "Hangul"), (0xD7B0, "Other"),
    (0xD800, ""), (0xF900, "Han"), (0xFB00, "Latin"), (0xFB13, "Armenian"), (0xFB1D, "Hebrew"),
    (0xFB50, "Arabic"), (0xFE00, ""), (0xFE70, "Arabic"), (0xFEFF, ""), (0xFF21, "Latin"), (0xFF3B, ""),
    (0xFF41, "Latin"), (0xFF5B, ""), (0xFF66, "Katakana"), (0xFFA0, "Hangul"), (0xFFE0, ""),
    (0x10000, "Other"), (0x1D000, ""), (0x1E000, "Other"), (0x1F000, ""), (0x20000, "Han"), (0x32000, ""),
]  # fmt: skip
_SCRIPTS = sorted({script for _, script in _BLOCKS} - {""})
_STARTS = np.array([start for start, _ in _BLOCKS], dtype=np.uint32)
_SCRIPT_OF_BLOCK = np.array([_SCRIPTS.index(s) if s else len(_SCRIPTS) for _, s in _BLOCKS])

# These scripts determine the language group without looking at words.
_LANGUAGE_OF_SCRIPT = {
    "Hiragana": "ja", "Katakana": "ja", "Hangul": "ko", "Han": "zh", "Cyrillic": "cyrillic",
    "Arabic": "arabic", "Greek": "el",
    "Hebrew": "he", "Devanagari": "devanagari", "Bengali": "bn", "Thai": "th", "Tamil": "ta",
    "Telugu": "te", "Georgian": "ka", "Armenian": "hy",
}  # fmt: skip

_STOP_WORDS: dict[str, frozenset[str]] = {
    language: frozenset(words.split())
    for language, words in {
        "en": "the and of to is that it you for with this are have not be on what can your they how do i",
        "fr": "le la les des et est une du pour que qui dans pas vous je nous sur avec ce plus sont au",
        "de": "der die das und ist nicht ein eine ich sie zu den mit auf für von wie es dem im wir auch",
        "es": "el los las que y es una por para con del como más pero su no se lo en está qué te",
        "it": "il che di è un una per non sono con del della gli più come anche mi si ma nel questo",
        "pt": "o os as que não uma um para com do da em é por mais como mas você seu isso ao na",
        "nl": "het een van en dat niet je ik zijn voor met op ook maar aan wat deze er naar wordt",
        "pl": "nie się jest że na to jak czy ale dla co przez po są tego ich być jego może tylko",
        "sv": "och att det som är en inte på för med av jag du till har den ett om kan vi",
        "tr": "bir ve bu için ile çok ne gibi daha var değil olarak ben sen ama olan kadar mi da",
        "vi": "và của là không có được cho một người này trong các với để đã những khi tôi bạn",
        "id": "yang dan di ini itu dengan untuk tidak dari pada adalah dalam saya akan anda bisa ke",
    }.items()
}
_WORD = re.compile(r"[^\W\d_]+")


class Profile(Config):
    """The scripts and languages of a data set; stored as JSON for later runs. Shares sum to 1 (or are
    empty)."""

    version: Literal[1] = 1
    """Version of the definition, so that profiles of different definitions are never compared."""
    rows: int = 0
    """Number of rows in the sample."""
    scripts: dict[str, float] = Field(default_factory=dict)
    """Share of letters by Unicode script."""
    languages: dict[str, float] = Field(default_factory=dict)
    """Share of rows by guessed language; "und" if it is unknown."""


def read_profile(baseline: dict[str, object]) -> Profile:
    """The baseline as a profile; raises DataError if it is not a profile of this version."""
    try:
        return Profile.model_validate(baseline)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"the gate's baseline is not a profile: {where}: {first['msg']}",
            "Use the `profile` object of an earlier gate report, or remove the baseline",
        ) from error


def load_baseline(path: str) -> dict[str, object]:
    """The profile in an earlier gate report.

    Raises:
        DataError: the file cannot be read or contains no profile of this version.
    """
    try:
        report = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"the gate's baseline {path} cannot be read ({error})",
            "Set gate.baseline to the gate.json of an earlier run",
        ) from error
    profile = report.get("profile", report) if isinstance(report, dict) else {}
    return read_profile(profile).model_dump()


def _plain(prompt: str, chat: bool) -> str:
    if not chat:
        return prompt
    try:
        return "\n".join(str(turn.get("content", "")) for turn in json.loads(prompt))
    except (ValueError, AttributeError, TypeError):
        return prompt


def _script_counts(text: str) -> np.ndarray:
    """Letters of `text` by script, in the order of _SCRIPTS."""
    points = np.frombuffer(text.encode("utf-32-le", "replace"), dtype=np.uint32)
    blocks = np.searchsorted(_STARTS, points, side="right") - 1
    return np.bincount(_SCRIPT_OF_BLOCK[blocks], minlength=len(_SCRIPTS) + 1)[:-1]


def _language(text: str, scripts: np.ndarray) -> str:
    """The guessed language of a row, from its scripts or its common words."""
    letters = int(scripts.sum())
    if not letters:
        return "und"
    share = dict(zip(_SCRIPTS, (scripts / letters).tolist(), strict=True))
    if share["Hiragana"] + share["Katakana"] > 0.1:  # Japanese is written with many Han characters
        return "ja"
    top = max(share, key=lambda script: share[script])
    if top != "Latin":
        return _LANGUAGE_OF_SCRIPT.get(top, "und")
    words = _WORD.findall(text.lower())
    hits = {language: sum(word in stop for word in words) for language, stop in _STOP_WORDS.items()}
    best = max(hits, key=lambda language: hits[language])
    return best if hits[best] else "und"


def profile(
    frame: pd.DataFrame, usable: "np.ndarray", text_columns: list[str], *, rows: int, seed: int
) -> Profile:
    """Count scripts and guess languages in a seeded sample of at most `rows` rows.

    Args:
        frame: has `chat`, `prompt` and the text columns.
        usable: (rows,) bool, the rows whose texts are all strings; others are skipped.
        text_columns: the columns whose texts are joined; of a chat prompt, the texts of its messages.
    """
    picks = np.flatnonzero(usable)
    if len(picks) > rows:
        picks = np.sort(np.random.default_rng(seed).choice(picks, size=rows, replace=False))
    frame = frame.iloc[picks]
    letters = np.zeros(len(_SCRIPTS), dtype=np.int64)
    languages: dict[str, int] = {}
    chats = frame["chat"].tolist()
    for chat, *texts in zip(chats, *(frame[column].tolist() for column in text_columns), strict=True):
        parts = [
            _plain(text, bool(chat)) if column == "prompt" else text
            for column, text in zip(text_columns, texts, strict=True)
        ]
        # The first characters of a long row suffice to guess its language, and limit the cost.
        text = "\n".join(part[:1000] for part in parts)
        counts = _script_counts(text)
        letters += counts
        language = _language(text, counts)
        languages[language] = languages.get(language, 0) + 1
    total = int(letters.sum())
    return Profile(
        rows=len(frame),
        scripts={
            name: int(n) / total for name, n in zip(_SCRIPTS, letters.tolist(), strict=True) if n and total
        },
        languages={name: n / len(frame) for name, n in sorted(languages.items())},
    )


def distance(left: dict[str, float], right: dict[str, float]) -> float:
    """Total variation distance of two distributions, 0 to 1: half the sum of absolute differences."""
    return 0.5 * sum(abs(left.get(key, 0.0) - right.get(key, 0.0)) for key in left.keys() | right.keys())
