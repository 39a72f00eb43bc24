"""Text to ids and back, where a text continues another.

A tokenizer of the SentencePiece kind puts a blank in front of every text, and drops it when it decodes: right
at the beginning of a sequence, wrong for an answer that follows its prompt.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts that no tokenizer joins with a letter, tried in turn.
_ANCHORS = ("\n", "\n\n", ".", "0")


class TextCodec:
    """Encodes and decodes plain text, in which control tokens are text."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        alone, added = self.encode("a"), tokenizer.encode("a", add_special_tokens=True)
        before = next((i for i in range(len(added)) if added[i : i + len(alone)] == alone), 0)
        # The beginning-of-sequence id, where the tokenizer itself would add one.
        self.begin: list[int] = [i for i in added[:before][:1] if i == tokenizer.bos_token_id]
        usable = [a for a in _ANCHORS if self._after(a, "a", self.encode) is not None]
        # None: a text has the same ids wherever it stands.
        differs = usable and self._after(usable[0], "a", self.encode) != alone
        self._anchors = usable if differs else []
        self._anchor = usable[0] if differs else None

    def encode(self, text: str) -> list[int]:
        """Ids of a text at the beginning of a sequence."""
        # Text is data: a special token written inside it must not become control. The gate reports such rows.
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def inside(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Ids of a text that continues another: no blank is added in front.

        Args:
            encode: of text at the beginning, with or without control tokens.
        """
        if not text:
            return encode(text)
        # A text that begins with line breaks shares a token with some anchors.
        behind = (self._after(anchor, text, encode) for anchor in self._anchors)
        return next((ids for ids in behind if ids is not None), None) or encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of ids that continue a prompt, without special tokens; blanks in front are kept."""
        if self._anchor is None:
            return self._decoded(ids)
        anchor = self.encode(self._anchor)
        start = self._decoded(anchor)
        whole = self._decoded(anchor + ids)
        return whole[len(start) :] if whole.startswith(start) else self._decoded(ids)

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    @staticmethod
    def _after(anchor: str, text: str, encode: Callable[[str], list[int]]) -> list[int] | None:
        """Ids of the text behind an anchor, None where the two share a token."""
        start, whole = encode(anchor), encode(anchor + text)
        return whole[len(start) :] if whole[: len(start)] == start else None
