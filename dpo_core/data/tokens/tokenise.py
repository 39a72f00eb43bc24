"""Tokenises prompts and completions, with an explicit mask of the tokens that carry loss.

Chosen and rejected have exactly the same prompt tokens. The chat template decides the tokens of an answer
(`chat_format`); without one they are the tokens of its text and an end-of-sequence token. Later code never
infers a mask from token values, because pad may equal eos.
"""

import datetime
import json
import math
from collections.abc import Iterable
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from dpo_core.data.tokens.chat_format import ChatFormat
from dpo_core.data.tokens.chat_template import ChatTemplate, Message, TemplateError, source_of
from dpo_core.data.tokens.config import TokenConfig
from dpo_core.data.tokens.encoding import TextCodec, encode_parts
from dpo_core.data.tokens.image_codes import image_codes, text_of
from dpo_core.data.tokens.sequences import TokenPair, TokenSequence
from dpo_core.data.tokens.stop_tokens import stop_ids
from dpo_core.data.tokens.turns import SPEAKERS, answer_turns, can_drop_turn, drop_turn, keep_end, shortened
from dpo_core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Ids = tuple[int, ...]
# Ids of a completion, and which carry loss (None: all).
Completion = tuple[Ids, tuple[bool, ...] | None]


class Tokenise:
    """Turns prompts and completions into ids under one `TokenConfig`."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", config: TokenConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.eos: int = tokenizer.eos_token_id
        self.codec = TextCodec(tokenizer)
        self.images = image_codes(tokenizer)
        """Of a model whose completions are images."""
        day = config.date or datetime.date.today()
        variables = {**tokenizer.special_tokens_map, **config.template_arguments}
        self._formats = {
            tools: ChatFormat(ChatTemplate(source, variables, day), tokenizer)
            for tools in (False, True)
            if (source := source_of(tokenizer, tools))
        }
        ends = {tokenizer.convert_tokens_to_ids(t) for f in self._formats.values() for t in f.stops}
        self.stop_ids: frozenset[int] = frozenset(stop_ids(tokenizer) | ends)
        """Tokens that end a sampled answer, from the model's files and the template's end of turn."""

    # --- prompts ------------------------------------------------------------------------------------------

    def prompt(self, text: str, chat: bool, budget: int | None = None, tools: str = "") -> Ids:
        """Prompt ids, at most `budget`: oldest turns are dropped first, then text from the left of a turn.

        Empty if even a prompt without text does not fit.

        Args:
            tools: JSON of the tools that the conversation may call; empty for none.
        """
        turns = self._turns(text, chat)
        if turns is None:
            ids = self.codec.begin + self.codec.encode(text)
            if self.images and self.tokenizer.unk_token_id in ids:
                raise TemplateError(
                    f"the prompt {text!r} has words that the model does not know",
                    "Use prompts of the words that it was trained on",
                )
            if budget is not None:
                ids = keep_end(ids, budget - bool(self.images), len(self.codec.begin))
            opened = self.images.opened(ids) if self.images else tuple(ids)
            return opened if budget is None or len(opened) <= budget else ()
        listed = json.loads(tools) if tools else None
        if budget is not None:
            cut = self._cut(turns, listed, budget)
            return () if cut is None else tuple(self._opened(cut, listed))
        return tuple(self._opened(turns, listed))

    def prompt_of(self, row: dict[str, Any], room: int) -> Ids:
        """The prompt ids of a canonical row before an answer of at most `room` tokens; cut as in training,
        only if both together exceed `max_length`."""
        text, chat, tools = row["prompt"], bool(row["chat"]), row.get("tools") or ""
        ids = self.prompt(text, chat, tools=tools)
        if len(ids) + room <= self.config.max_length:
            return ids
        budget = min(self.config.max_prompt_length, max(self.config.max_length - room, 1))
        return self.prompt(text, chat, budget, tools)

    def chat_format(self, tools: Any = None) -> ChatFormat:
        """The format in which the chat template writes conversations.

        Raises:
            ModelError: the tokenizer has no chat template.
        """
        form = self._formats.get(bool(tools))
        if form is None:
            raise ModelError(
                "the prompts are conversations, but the tokenizer has no chat template",
                "Set tokens.template to transcript, or model.chat_template to a template file",
            )
        return form

    @property
    def writes_template(self) -> bool:
        """Whether messages are written with the tokenizer's chat template."""
        return bool(self._formats) and self.config.template in ("auto", "chat")

    def _turns(self, text: str, chat: bool) -> list[Message] | None:
        """The messages of a prompt; None for plain text."""
        if chat:
            return list(json.loads(text))
        if self.config.template != "chat":
            return None
        return [{"role": "user", "content": text}] if text else []

    def _opened(self, turns: list[Message], tools: list[Any] | None) -> list[int]:
        """Ids of a conversation with the assistant's turn opened."""
        if not turns:
            return []
        if self.config.template in ("transcript", "plain"):
            ids = self.codec.begin + self.codec.encode(self._transcript(turns, tools))
        else:
            form = self.chat_format(tools)
            ids = form.encode(form.write(turns, tools, opened=True))
        return list(self.images.opened(ids)) if self.images else ids

    def _transcript(self, turns: list[Message], tools: list[Any] | None) -> str:
        if tools or any(m.get("tool_calls") for m in turns):
            raise TemplateError(
                f"tokens.template {self.config.template} does not support tools and tool calls",
                "Set tokens.template to chat, or remove them from the data",
            )
        texts = [m.get("content") or "" for m in turns]
        if self.config.template == "plain":
            return "\n\n".join(texts)
        spoken = zip(turns, texts, strict=True)
        return "".join(f"\n\n{SPEAKERS[m['role']]}: {t}" for m, t in spoken) + "\n\nAssistant:"

    def _cut(self, turns: list[Message], tools: list[Any] | None, budget: int) -> list[Message] | None:
        """The conversation cut to the budget; None if the template's text alone exceeds it."""

        def fits(messages: list[Message]) -> bool:
            return len(self._opened(messages, tools)) <= budget

        turns = list(turns)
        while not fits(turns) and can_drop_turn(turns):
            drop_turn(turns)
        return turns if fits(turns) else shortened(turns, fits)

    # --- answers ------------------------------------------------------------------------------------------

    def completion(
        self,
        text: str,
        ended: bool,
        prompt: str | None = None,
        chat: bool = False,
        tools: str = "",
        answer_chat: bool = False,
    ) -> Ids:
        """Ids of an answer, with the end of its turn if it `ended`; a cut answer has no end.

        Args:
            prompt: the prompt, from which the template determines the tokens of the answer. None: encode only
                the text.
            answer_chat: `text` is the JSON of the answer's messages.
        """
        turns = None if prompt is None else self._turns(prompt, chat)
        answer = answer_turns(text, answer_chat)
        return self._answer(turns, answer, json.loads(tools) if tools else None, ended)[1][0]

    def _answer(
        self, turns: list[Message] | None, answer: list[Message], tools: list[Any] | None, ended: bool
    ) -> tuple[Ids, Completion]:
        """The ids of the prompt (empty for plain text) and of the answer."""
        if self.images and not tools and len(answer) == 1:
            return (), (self.images.ids(answer[0].get("content") or ""), None)
        if turns is not None and self.config.template in ("auto", "chat"):
            form = self.chat_format(tools)
            every = self.config.learn == "all_turns"
            rendered = form.answer(turns, answer, tools, ended=ended, every_turn=every)
            prompt, ids, learnt = encode_parts(
                rendered, form.encode, lambda text: self.codec.inside(text, form.encode)
            )
            return tuple(prompt), (tuple(ids), None if all(learnt) else tuple(learnt))
        if len(answer) != 1 or answer[0].get("tool_calls"):
            raise TemplateError(
                "an answer of several turns or with tool calls needs a chat template",
                "Set tokens.template to chat, with a model that has one",
            )
        text = answer[0].get("content") or ""
        if turns is not None and text[:1].strip():
            text = (" " if self.config.template == "transcript" else "\n\n") + text
        end = (self.eos,) if ended else ()
        return (), ((*self.codec.inside(text, self.codec.encode), *end), None)

    def _side(self, row: dict[str, Any], name: str, ended: str, budget: int | None) -> tuple[Ids, Completion]:
        """The prompt, cut to the budget, and the answer of one side of a canonical row."""
        tools = row.get("tools") or ""
        listed = json.loads(tools) if tools else None
        turns = self._turns(row["prompt"], bool(row["chat"]))
        answer = answer_turns(row[name], bool(row.get("answer_chat")))
        if turns is None:
            prompt = self.prompt(row["prompt"], False, budget)
            return prompt, self._answer(None, answer, None, row[ended])[1]
        if budget is not None and turns:
            turns = self._cut(turns, listed, budget)
        if not turns:
            return (), ((), None)
        prompt, completion = self._answer(turns, answer, listed, row[ended])
        return prompt or tuple(self._opened(turns, listed)), completion

    def _sides(self, row: dict[str, Any], sides: dict[str, str]) -> list[TokenSequence] | str:
        """The sequences of a row's sides (answer -> its flag) with a common prompt, or the reason for
        none."""
        try:
            parts = [self._side(row, name, ended, None) for name, ended in sides.items()]
            if any(len(p) + len(c[0]) > self.config.max_length for p, c in parts):
                budget = self.config.max_prompt_length
                parts = [self._side(row, name, ended, budget) for name, ended in sides.items()]
        except TemplateError:
            return "refused_by_template"
        if not parts[0][0]:
            return "empty_prompt"
        made = [self.sequence(prompt, *completion) for prompt, completion in parts]
        if self.images and any(sequence and sequence.truncated for sequence in made):
            return "image_does_not_fit"
        sequences = [sequence for sequence in made if sequence is not None]
        return sequences if len(sequences) == len(made) else "empty_completion"

    def refusal(self, row: dict[str, Any]) -> str | None:
        """The reason why the chat template cannot write a canonical row; None if it can."""
        sides = {"chosen": "chosen_ended", "rejected": "rejected_ended", "completion": "ended"}
        try:
            self.prompt(row["prompt"], bool(row["chat"]), tools=row.get("tools") or "")
            for name, ended in sides.items():
                if name in row:
                    self._side(row, name, ended, None)
        except TemplateError as error:
            return str(error)
        return None

    def note_on(self, chat: list[bool]) -> str:
        """A note if text prompts are written without the model's chat template, with the settings that change
        that; empty if that does not apply."""
        texts = len(chat) - sum(map(bool, chat))
        if not texts or not self._formats or self.config.template != "auto":
            return ""
        return (
            f"{texts} of {len(chat)} prompts are texts and are written without the model's chat template. "
            "Set tokens.template to chat to make each a user turn, or to plain to confirm this"
        )

    def sequence(
        self, prompt: Ids, completion: Ids, learnt: tuple[bool, ...] | None = None
    ) -> TokenSequence | None:
        """Join prompt and completion and cut the completion from the right to `max_length`.

        A cut answer gets no end-of-sequence token. None if no token that carries loss is left, or if there is
        no prompt, from which the first token would be predicted.
        """
        room = self.config.max_length - len(prompt)
        cut = completion[: max(room, 0)]
        learnt = None if learnt is None else learnt[: len(cut)]
        if not prompt or not cut or (learnt is not None and not any(learnt)):
            return None
        return TokenSequence(prompt, cut, len(cut) < len(completion), learnt)

    def pair(self, row: dict[str, Any]) -> TokenPair | str:
        """The pair of a canonical row, or the reason why it cannot be used."""
        sides = self._sides(row, {"chosen": "chosen_ended", "rejected": "rejected_ended"})
        if isinstance(sides, str):
            return sides
        if sides[0].completion == sides[1].completion:
            return "identical_after_truncation"
        agreement = row.get("agreement")
        voted = agreement is not None and not math.isnan(agreement)  # parquet gives NaN for an empty field
        return TokenPair(row["id"], sides[0], sides[1], agreement=agreement if voted else None)

    def single(self, row: dict[str, Any]) -> TokenSequence | str:
        """The completion of a canonical unpaired row with its prompt, or the reason why it cannot be used."""
        sides = self._sides(row, {"completion": "ended"})
        return sides if isinstance(sides, str) else sides[0]

    def scored(self, prompt: str, chat: bool, answer: str) -> TokenSequence:
        """The sequence of a complete answer to a prompt, for a reward model.

        Raises:
            ModelError: prompt and answer do not fit into `max_length`, or the template refuses them.
        """
        made = self.single({"prompt": prompt, "chat": chat, "completion": answer, "ended": True})
        if isinstance(made, str):
            raise ModelError(
                f"an answer cannot be scored ({made.replace('_', ' ')})",
                "Raise tokens.max_length and tokens.max_prompt_length, or choose another tokens.template",
            )
        return made

    def demonstration(self, row: dict[str, Any]) -> TokenSequence | str:
        """`single` for supervised fine-tuning: with `learn: all_turns` the assistant turns in the prompt are
        part of the answer."""
        turns = json.loads(row["prompt"]) if row["chat"] else []
        first = next((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), 0)
        if self.config.learn == "last_turn" or not first:
            return self.single(row)
        answer = turns[first:] + answer_turns(row["completion"], bool(row.get("answer_chat")))
        moved = {"prompt": json.dumps(turns[:first]), "completion": json.dumps(answer), "answer_chat": True}
        return self.single({**row, **moved})

    def sides(self, row: dict[str, Any]) -> dict[str, TokenSequence | str]:
        """The sides of a canonical row of any kind by name: sequences, or the reasons why there are none.

        A row with only a prompt gives a sequence without completion.
        """
        if "chosen" in row:
            both = {"chosen": "chosen_ended", "rejected": "rejected_ended"}
            made = self._sides(row, both)
            return dict.fromkeys(both, made) if isinstance(made, str) else dict(zip(both, made, strict=True))
        if "completion" in row:
            return {"completion": self.single(row)}
        ids = self.prompt(row["prompt"], bool(row["chat"]), tools=row.get("tools") or "")
        if len(ids) > self.config.max_prompt_length:
            ids = self.prompt(
                row["prompt"], bool(row["chat"]), self.config.max_prompt_length, row.get("tools") or ""
            )
        return {"prompt": TokenSequence(ids, ()) if ids else "empty_prompt"}

    def pairs(self, rows: Iterable[dict[str, Any]]) -> tuple[list[TokenPair], dict[str, int]]:
        """All usable pairs, and the number of rows left out by reason."""
        usable: list[TokenPair] = []
        dropped: dict[str, int] = {}
        for row in rows:
            result = self.pair(row)
            if isinstance(result, str):
                dropped[result] = dropped.get(result, 0) + 1
            else:
                usable.append(result)
        return usable, dropped

    def text(self, completion: Iterable[int], prompt: Iterable[int] | None = None) -> str:
        """The text of a sampled answer for people and rewards: up to the end of its turn, without special
        tokens and the template's text around answers.

        Args:
            prompt: ids of the prompt; after plain text, no text is removed as the template's. None: a
                conversation.
        """
        ids = list(completion)
        if self.images:
            return text_of(ids)
        end = next((at for at, token in enumerate(ids) if token in self.stop_ids), len(ids))
        ids = ids[:end]
        if not self.writes_template or not self._is_opened(prompt):
            return self.codec.decode(ids)
        return self._own_text(ids, blank=self._adds_blank)

    def _own_text(self, ids: list[int], *, blank: bool) -> str:
        """The text of a template's answer without the header; `blank`: also without one leading space."""
        form = self.chat_format()
        start = self.codec.inside(form.header, form.encode) if form.header else []
        headed = bool(start) and ids[: len(start)] == start
        text = self.codec.decode(ids[len(start) :] if headed else ids)
        return form.bare(text.removeprefix(" ") if blank else text, header=not headed)

    def _is_opened(self, prompt: Iterable[int] | None) -> bool:
        """Whether a prompt ends with the template's opening of the assistant's turn."""
        if prompt is None:
            return True
        last = self._opening
        return bool(last) and list(prompt)[-len(last) :] == last

    @cached_property
    def _opening(self) -> list[int]:
        """The last one or two tokens common to all prompts with the assistant's turn opened; empty if the
        template refuses a short prompt."""
        try:
            first, second = (
                self._opened([{"role": "user", "content": text}], None) for text in ("Well", "Is it 5?")
            )
        except TemplateError:
            return []
        tokens = zip(reversed(first[-2:]), reversed(second[-2:]), strict=False)
        return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], tokens)][::-1]

    @cached_property
    def _adds_blank(self) -> bool:
        """Whether the tokenizer adds a space after the opened turn that the template does not write, as
        Llama 2 tokenizers do after each control token."""
        user: list[Message] = [{"role": "user", "content": "Well"}]
        try:
            ids = list(self._answer(user, answer_turns("Yes", False), None, False)[1][0])
        except TemplateError:
            return False
        return self._own_text(ids, blank=False) != "Yes" == self._own_text(ids, blank=True)
