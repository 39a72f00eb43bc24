"""Which evaluation prompts stand in the training data: whole, or by 13 words in a row (Brown et al. 2020).

Texts are compared as words: Unicode's compatible forms made one, case, punctuation and white space left out.
A language that is written without spaces is found by whole prompts only.
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

How = Literal["exact", "13-gram"]

WORDS = 13
TEMPLATE = 10
"""Words that more than so many different prompts share are the suite's wording, not a question of it."""

_ANSWERS = ("chosen", "rejected", "completion")
_TURN = re.compile(r"\n\n(?:Human|Assistant):")
_WORD = re.compile(r"\w+")
_BLOCK = 250_000  # words whose n-grams are made at a time: some 30 MB
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # any odd number with bits all over

Hashes = NDArray[np.uint64]


class TrainingText:
    """What a model was trained on, as hashes: 8 bytes for each different 13-gram, about 60 for each text.

    Hashes are of 64 bits: that a prompt of 100 words is found by chance among a billion 13-grams has a
    probability of 5e-9. They hold in this process only, as Python's hashes of words do. Measured: 100,000
    texts of 200 words, none alike, take 9 s of one core and 150 MB, 190 MB at the most.

    Args:
        texts: prompts and answers, each by itself, as `training_texts` gives those of a table. A transcript
            in the format of HH is taken turn by turn as well.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._whole: set[int] = set()
        self._grams = _distinct(np.concatenate([*self._blocks(texts)]))

    @property
    def bytes(self) -> int:
        """Memory of the 13-grams."""
        return self._grams.nbytes

    def find(self, items: Iterable[Item]) -> dict[str, How]:
        """The ids of the items whose own `prompt` stands in these texts, and how.

        A prompt of fewer than 13 words is found only whole. Answers are not looked for, nor what a suite
        puts around every prompt (instructions, worked examples), which `Item.prompt` does not hold.
        """
        words = {item.id: words_of(item.prompt) for item in items}
        grams = {tuple(prompt): _grams([prompt]) for prompt in words.values()}
        seen = Counter(gram for found in grams.values() for gram in set(found.tolist()))
        template = np.array([gram for gram, prompts in seen.items() if prompts > TEMPLATE], np.uint64)
        found: dict[str, How] = {}
        for name, prompt in words.items():
            if prompt and _whole(prompt) in self._whole:
                found[name] = "exact"
            elif self._holds(np.setdiff1d(grams[tuple(prompt)], template)):
                found[name] = "13-gram"
        return found

    def _holds(self, grams: Hashes) -> bool:
        if not len(self._grams):
            return False
        place = np.minimum(np.searchsorted(self._grams, grams), len(self._grams) - 1)
        return bool((self._grams[place] == grams).any())

    def _blocks(self, texts: Iterable[str]) -> Iterator[Hashes]:
        """13-grams of texts not seen before; remembers each text and its turns whole."""
        block: list[list[str]] = []
        size = 0
        for text in texts:
            words = words_of(text)
            if not words or (whole := _whole(words)) in self._whole:
                continue
            self._whole.add(whole)
            if len(turns := _TURN.split(text)) > 1:
                self._whole.update(_whole(turn) for one in turns if (turn := words_of(one)))
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
    """The words of a text, without what two copies of it may differ in."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _whole(words: list[str]) -> int:
    return hash(" ".join(words))


def _grams(texts: list[list[str]]) -> Hashes:
    """Hashes of the 13-grams of texts, none of which spans two: Σ_j hash(word_{i+j})·M^j modulo 2^64."""
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
    """Sorted in place, each once: `np.unique` takes many times as long and as much memory."""
    hashes.sort()
    return hashes[np.concatenate([[True], hashes[1:] != hashes[:-1]])] if len(hashes) else hashes
