"""Encodes and decodes text that continues another text, without the extra space of some tokenizers.

SentencePiece tokenizers add a space before every text and remove it when decoding. That is right at the
beginning of a sequence, but wrong for an answer that follows its prompt.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from dpo_core.data.tokens.chat_format import Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encode = Callable[[str], list[int]]

# Texts that tokenizers do not merge with a letter, tried in order.
_ANCHORS = ("\n", "\n\n", ".", "0")


class TextCodec:
    """Encodes and decodes plain text; control tokens in it are encoded as text."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        plain, added = self.encode("a"), tokenizer.encode("a", add_special_tokens=True)
        before = next((i for i in range(len(added)) if added[i : i + len(plain)] == plain), 0)
        # The beginning-of-sequence id, if the tokenizer adds one.
        self.begin: list[int] = [i for i in added[:before][:1] if i == tokenizer.bos_token_id]
        usable = [a for a in _ANCHORS if self._after(a, "a", self.encode) is not None]
        # None: the ids of a text do not depend on its position.
        differs = usable and self._after(usable[0], "a", self.encode) != plain
        self._anchors = usable if differs else []
        self._anchor = usable[0] if differs else None

    def encode(self, text: str) -> list[int]:
        """Ids of a text at the beginning of a sequence."""
        # A special token spelled out in a text must not become a control token; the gate reports it.
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def inside(self, text: str, encode: Encode) -> list[int]:
        """Ids of a text that continues another, without a space added in front.

        Args:
            encode: encodes text at the beginning of a sequence.
        """
        if not text:
            return encode(text)
        # A text that begins with line breaks may be merged with some anchors.
        behind = (self._after(anchor, text, encode) for anchor in self._anchors)
        return next((ids for ids in behind if ids is not None), None) or encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of ids that continue a prompt, without special tokens; leading spaces are kept."""
        if self._anchor is None:
            return self._decoded(ids)
        anchor = self.encode(self._anchor)
        start = self._decoded(anchor)
        text = self._decoded(anchor + ids)
        return text[len(start) :] if text.startswith(start) else self._decoded(ids)

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    @staticmethod
    def _after(anchor: str, text: str, encode: Encode) -> list[int] | None:
        """Ids of the text after an anchor; None if a token covers parts of both."""
        start, full = encode(anchor), encode(anchor + text)
        return full[len(start) :] if full[: len(start)] == start else None


def encode_parts(
    rendered: Rendered, encode: Encode, inside: Encode
) -> tuple[list[int], list[int], list[bool]]:
    """Ids of the prompt, ids of the rest, and which of the latter carry loss.

    Args:
        encode: encodes text at the beginning of a sequence.
        inside: encodes text that continues a sequence.
    """
    text, start = rendered.text, rendered.start
    prompt, full = encode(text[:start]), encode(text)
    borders = sorted({start, len(text)} | {place for span in rendered.spans for place in span})
    counts = {start: len(prompt), len(text): len(full)}
    fits = full[: len(prompt)] == prompt
    for place in borders[1:-1]:
        ids = encode(text[:place])
        counts[place] = len(ids)
        fits &= full[: len(ids)] == ids
    if not fits:
        # A token of the full text crosses a border (such as a line break before the answer's own). The model
        # continues the tokens of its prompt, so the pieces are encoded separately.
        full = list(prompt)
        for begin, end in pairwise(borders):
            full += inside(text[begin:end])
            counts[end] = len(full)
    learnt = [False] * (len(full) - len(prompt))
    for begin, end in rendered.spans:
        for place in range(counts[begin], counts[end]):
            learnt[place - len(prompt)] = True
    return prompt, full[len(prompt) :], learnt
