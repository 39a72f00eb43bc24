"""Images as tokens: an image is a completion of a fixed number of codes, the first ids of the vocabulary.

Models of images name this in their config and tokenizer, as `image_codes`. The canonical text of an image is
its codes as numbers with spaces between: "0 17 17 3 …".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpo_core.data.tokens.chat_template import TemplateError


@dataclass(frozen=True)
class ImageCodes:
    """The images that a model makes."""

    count: int
    """Codes: the ids 0 to count - 1, to which the distribution of the next token is restricted."""
    length: int
    """Codes of an image, which has no end token."""
    codec: str
    """The world or the decoder that turns codes into pixels; see `dpo_core.models.image_codec`."""
    opening: int
    """The token that ends each prompt and opens the image: codes find their row and column by it."""
    padding: int | None = None
    """The token that stands for each word in the prompt that says nothing; None: it has no words."""
    words: int | None = None
    """Tokens of each prompt before `opening`: shorter prompts are filled up with `padding`, so that a word is
    equally far from a row and column in every prompt. None: prompts are as long as they are."""

    def ids(self, text: str) -> tuple[int, ...]:
        """The codes of an image's canonical text.

        Raises:
            TemplateError: it is not an image of this model.
        """
        words = text.split()
        if len(words) != self.length or not all(w.isdecimal() and int(w) < self.count for w in words):
            raise TemplateError(
                f"{text[:40]!r} is not an image of the model: {self.length} numbers below {self.count}",
                "Encode the image with the model's own codes",
            )
        return tuple(map(int, words))

    def opened(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """A prompt, filled up to `words`, and the token that opens the image.

        Raises:
            TemplateError: it has more tokens than `words`.
        """
        missing = 0 if self.words is None else self.words - len(prompt)
        if missing < 0:
            raise TemplateError(
                f"a prompt has {len(prompt)} tokens, and the model was made for {self.words}",
                "Use shorter prompts",
            )
        filling = () if self.padding is None else (self.padding,) * missing
        return *prompt, *filling, self.opening

    def null_prompt(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """The prompt that says nothing, for guidance: the tokens that begin a prompt and open the image, with
        `padding` between them, which is attended to."""
        between = () if self.padding is None else (self.padding,) * (len(prompt) - 2)
        return prompt[0], *between, self.opening


def image_codes(holder: Any) -> ImageCodes | None:
    """The images of a model, by its config or its tokenizer; None for a model of text."""
    facts = getattr(holder, "init_kwargs", holder)
    found = facts.get("image_codes") if isinstance(facts, dict) else getattr(facts, "image_codes", None)
    return ImageCodes(**found) if found else None


def text_of(ids: Sequence[int]) -> str:
    """The canonical text of an image."""
    return " ".join(map(str, ids))
