"""Finds evaluation prompts in the training data: exact, or by a shared 13-gram (Brown et al. 2020).

Texts are compared as words: NFKC-normalised, without case, punctuation and white space. In a language that is
written without spaces only exact prompts are found.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from dpo_core.evaluation.results import Item

if TYPE_CHECKING:
    import pandas as pd

Match = Literal["exact", "13-gram"]

WORDS = 13
TEMPLATE = 10
"""A 13-gram of more than this number of prompts is the suite's template, not part of a question."""

_ANSWERS = ("chosen", "rejected", "completion")
_TURN = re.compile(r"\n\n(?:Human|Assistant):")
_WORD = re.compile(r"\w+")
_BLOCK = 250_000  # words whose n-grams are computed at a time: some 30 MB
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # any odd number with well-mixed bits

Hashes = NDArray[np.uint64]


class TrainingText:
    """Hashes of a model's training texts: 8 bytes for each distinct 13-gram, about 60 for each text.

    Hashes have 64 bits: a prompt of 100 words matches one of a billion 13-grams by chance with probability
    5e-9. They are valid in this process only, as Python's hashes of words are. Measured: 100,000 distinct
    texts of 200 words take 9 s of one core and 150 MB, at most 190 MB.

    Args:
        texts: prompts and answers, one by one, as `training_texts` returns those of a table. The turns of a
            transcript in HH format are added, too.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts: set[int] = set()
        self._grams = _distinct(np.concatenate([*self._blocks(texts)]))

    def find(self, items: Iterable[Item]) -> dict[str, Match]:
        """The ids of the items whose `prompt` is in these texts, with the kind of match.

        A prompt of fewer than 13 words is found only if exact. Answers are not searched, nor a suite's
        instructions and worked examples, which `Item.prompt` does not contain.
        """
        words = {item.id: words_of(item.prompt) for item in items}
        grams = {tuple(prompt): _grams([prompt]) for prompt in words.values()}
        counts = Counter(gram for hashes in grams.values() for gram in set(hashes.tolist()))
        template = np.array([gram for gram, prompts in counts.items() if prompts > TEMPLATE], np.uint64)
        matches: dict[str, Match] = {}
        for name, prompt in words.items():
            if prompt and _hash(prompt) in self._texts:
                matches[name] = "exact"
            elif self._holds(np.setdiff1d(grams[tuple(prompt)], template)):
                matches[name] = "13-gram"
        return matches

    def _holds(self, grams: Hashes) -> bool:
        if not len(self._grams):
            return False
        place = np.minimum(np.searchsorted(self._grams, grams), len(self._grams) - 1)
        return bool((self._grams[place] == grams).any())

    def _blocks(self, texts: Iterable[str]) -> Iterator[Hashes]:
        """13-grams of the distinct texts; records the hash of each full text and of its turns."""
        block: list[list[str]] = []
        size = 0
        for text in texts:
            words = words_of(text)
            if not words or (digest := _hash(words)) in self._texts:
                continue
            self._texts.add(digest)
            if len(turns := _TURN.split(text)) > 1:
                self._texts.update(_hash(turn) for text in turns if (turn := words_of(text)))
            block.append(words)
            size += len(words)
            if size >= _BLOCK:
                yield _distinct(_grams(block))
                block, size = [], 0
        yield _distinct(_grams(block))


def training_texts(frame: "pd.DataFrame") -> Iterator[str]:
    """Every prompt and answer of a canonical table (`data.records`), a conversation message by message."""
    for prompt, chat in zip(frame["prompt"], frame["chat"], strict=True):
        if chat:
            yield from (str(message["content"]) for message in json.loads(prompt))
        else:
            yield prompt
    for column in _ANSWERS:
        if column in frame:
            yield from frame[column]


def words_of(text: str) -> list[str]:
    """The words of a text, normalised for comparison."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _hash(words: list[str]) -> int:
    return hash(" ".join(words))


def _grams(texts: list[list[str]]) -> Hashes:
    """Hashes of the 13-grams within each text: Σ_j hash(word_{i+j})·M^j modulo 2^64."""
    lengths = np.array([len(words) for words in texts], np.int64)
    total = int(lengths.sum())
    if total < WORDS:
        return np.empty(0, np.uint64)
    word = np.fromiter((hash(w) for words in texts for w in words), np.int64, total).view(np.uint64)
    text = np.repeat(np.arange(len(texts)), lengths)
    count = total - WORDS + 1
    grams = np.zeros(count, np.uint64)
    for j in reversed(range(WORDS)):
        grams = grams * _MULTIPLIER + word[j : j + count]
    return grams[text[:count] == text[WORDS - 1 :]]


def _distinct(hashes: Hashes) -> Hashes:
    """The distinct hashes, sorted in place: `np.unique` needs many times the time and memory."""
    hashes.sort()
    return hashes[np.concatenate([[True], hashes[1:] != hashes[:-1]])] if len(hashes) else hashes
