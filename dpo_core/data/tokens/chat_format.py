"""Finds the tokens of a rendered conversation that the assistant writes and that therefore carry loss.

The answer is the rendering of prompt and answer minus the rendering of the prompt with the assistant's turn
opened. It includes a channel header or an empty think block, and the end of the turn. Text after the end of
the turn (a line break, or an end-of-text token) carries no loss.

The end of a turn is found by rendering: a mark is placed after the answer's last text, and the text after the
mark is compared with the text there when another turn follows. The end is the last control token that both
have in common, otherwise the first one after the answer. If a template writes none, an answer ends with the
token that opens the next turn.

Text is data: a control token spelled out in a message is rendered between two private marks, so that it is
encoded as text, while the control tokens of the template are encoded as control tokens.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dpo_core.data.tokens.chat_template import REASONING, ChatTemplate, Message, TemplateError

# Private-use characters: around a control token that a message spells out, and after an answer's texts.
_OPEN, _CLOSE, _END = "\U000f5a01", "\U000f5a02", "\U000f5a03"
_WORD = "Xq7Zword"  # stands for a message's text
_MARKS = re.compile(f"[{_OPEN}{_CLOSE}]")

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, with the spans that carry loss.

    The text may contain marks around control tokens that are data (see `ChatFormat.encode`).
    """

    text: str
    """The text up to the last character that carries loss."""
    start: int
    """End of the prompt, which includes the opening of the assistant's turn."""
    spans: list[Span]
    """Character spans that carry loss, in order."""


class ChatFormat:
    """The way in which one tokenizer's template writes turns.

    Args:
        template: the template with its time and variables.
        tokenizer: its added tokens include the template's control tokens.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Any) -> None:
        self.template, self.tokenizer = template, tokenizer
        added = tokenizer.added_tokens_decoder.values()
        self.control = frozenset(t.content for t in added if t.special and t.content)
        self.markers = frozenset(t.content for t in added if not t.special and t.content.strip())
        self._control = _any_of(self.control)
        self._ends = self._control if self._control.search("".join(self._suffixes)) else _any_of(self.markers)
        self._tails: dict[tuple[str, ...], str] = {}
        self._read: set[tuple[str, bool, bool, bool]] = set()

    # --- text ---------------------------------------------------------------------------------------------

    def write(self, messages: list[Message], tools: list[Any] | None, *, opened: bool) -> str:
        """The conversation's text, with marks around control tokens that are part of the messages."""
        self._require_places(messages, tools)
        text = self.template.render(messages, tools, opened=opened)
        self._require_texts(messages, tools, opened=opened)
        spelled = set(_matches(self._control, (messages, tools)))
        if not spelled:
            return text
        # A template that searches for a token (</think>) would not find it between marks; leave it unmarked.
        marked = text
        for tokens in [spelled, *({token} for token in sorted(spelled, key=len, reverse=True))]:
            pattern = _any_of(tokens)
            trial = self.template.render(_mark(pattern, messages), _mark(pattern, tools), opened=opened)
            if _MARKS.sub("", trial) == text:
                if tokens == spelled:
                    return trial
                marked = trial if marked == text else marked
        return marked

    def encode(self, text: str) -> list[int]:
        """Ids of marked text: control tokens between marks are encoded as text, others as control tokens."""
        if not _MARKS.search(text):
            return list(self.tokenizer.encode(text, add_special_tokens=False))
        ids: list[int] = []
        # The text between two of the template's control tokens is encoded in one piece.
        pieces = re.split(f"({_OPEN}.*?{_CLOSE})|({self._control.pattern})", text, flags=re.DOTALL)
        run = ""
        for at in range(0, len(pieces), 3):
            run += pieces[at]
            data, control = pieces[at + 1 : at + 3] or (None, None)
            if data:
                run += data[1:-1]
            if control:
                ids += self._as_text(run) + list(self.tokenizer.encode(control, add_special_tokens=False))
                run = ""
        return ids + self._as_text(run)

    def _as_text(self, text: str) -> list[int]:
        if not text:
            return []
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def _require_places(self, messages: list[Message], tools: list[Any] | None) -> None:
        """Refuse parts of messages that the template would silently leave out."""
        keys = {key for m in messages for key in ("tool_calls", *REASONING) if m.get(key)}
        for key in [*sorted(keys), *(["tools"] if tools else [])]:
            if not self.template.has_place_for(key):
                raise TemplateError(
                    f"the chat template does not support {key}",
                    "Remove it from the data, or set model.chat_template to a template that writes it",
                )

    def _require_texts(self, messages: list[Message], tools: list[Any] | None, *, opened: bool) -> None:
        """Refuse a message whose text the template leaves out: many support no system or tool turns, or write
        tool calls without the message's text."""
        for at, message in enumerate(messages):
            called = bool(message.get("tool_calls"))
            shape = (str(message["role"]), called, at == 0, at == len(messages) - 1)
            if not message.get("content") or shape in self._read:
                continue
            probe = [*messages[:at], {**message, "content": _WORD}, *messages[at + 1 :]]
            if _WORD not in self.template.render(probe, tools, opened=opened):
                beside = " beside its tool_calls" if called else ""
                raise TemplateError(
                    f"the chat template leaves out the text of message {at + 1} ({message['role']}){beside}",
                    "Remove it from the data, or set model.chat_template to a template that writes it",
                )
            self._read.add(shape)

    # --- where a turn ends --------------------------------------------------------------------------------

    def answer(
        self,
        prompt: list[Message],
        turns: list[Message],
        tools: list[Any] | None,
        *,
        ended: bool,
        every_turn: bool,
    ) -> Rendered:
        """Prompt and answer as one text, with the spans that carry loss.

        Args:
            turns: the answer's turns; the last is the assistant's.
            ended: whether to write the end of the last turn.
            every_turn: whether all assistant turns of the answer carry loss, or only the last.

        Raises:
            TemplateError: the rendered answer does not continue the rendered prompt.
        """
        messages = prompt + turns
        text = self.write(messages, tools, opened=False)
        opening = self.write(prompt, tools, opened=True)
        self._require_start(text, opening, "")
        last = len(messages) - 1
        learnt = [k for k in range(len(prompt), last) if every_turn and messages[k]["role"] == "assistant"]
        spans = []
        for k in learnt:
            part = self.write(messages[: k + 1], tools, opened=False)
            before = opening if k == len(prompt) else self.write(messages[:k], tools, opened=True)
            part_end = len(part) - len(self._tail(messages[: k + 1], tools, part))
            where = f" of message {k + 1}"
            self._require_start(text, before, where)
            self._require_start(text, part[:part_end], where)
            spans.append((len(before), self._end_inside(text, part_end, part[part_end:])))
        before = opening if last == len(prompt) else self.write(messages[:last], tools, opened=True)
        self._require_start(text, before, "")
        tail = self._tail(messages, tools, text)
        end = len(text) - len(tail)
        text = text[:end]
        if ended:
            text += self._closing(tail, messages, tools)
        spans.append((len(before), len(text)))
        for (begin, _), k in zip(spans, [*learnt, last], strict=True):
            if self.opens_reasoning and text.startswith(self.header, begin):
                raise TemplateError(
                    f"message {k + 1} has no reasoning_content, but the chat template opens the assistant's "
                    f"turn for it: the model would learn to write {_shown(self.header)} at once",
                    "Set tokens.template_arguments (such as {enable_thinking: false}), or add the reasoning",
                )
        return Rendered(text, len(opening), spans)

    def _require_start(self, text: str, start: str, where: str) -> None:
        if text.startswith(start):
            return
        at = _shared(text, start)
        arguments = "Set tokens.template_arguments (such as {enable_thinking: false})"
        keep = "tokens.learn to last_turn, " if where else ""
        raise TemplateError(
            f"the chat template's answer{where} does not continue the opened assistant's turn: after "
            f"{_shown(start[max(0, at - 20) : at])} the opening has {_shown(start[at : at + 30])}, the "
            f"answer {_shown(text[at : at + 30])}",
            f"{arguments}, {keep}or model.chat_template to a template that does not rewrite turns",
        )

    def _tail(self, messages: list[Message], tools: list[Any] | None, text: str) -> str:
        """The text that the template writes after the last message's text."""
        message = messages[-1]
        shape = tuple(sorted(key for key, value in message.items() if value))
        plain = not message.get("tool_calls")
        if plain and shape in self._tails and text.endswith(self._tails[shape]):
            return self._tails[shape]
        marked = {
            key: _mark_ends(value) if key in ("content", "tool_calls") and (value or plain) else value
            for key, value in message.items()
        }
        try:
            probe = self.write([*messages[:-1], marked], tools, opened=False)
        except TemplateError:
            probe = ""
        tail = probe.rpartition(_END)[2] if _END in probe else None
        if tail is None or not text.endswith(tail):
            # The template changes the message: use the end of other answers.
            tail = text[text.rindex(self.end) :] if self.end and self.end in text else ""
        elif plain:
            self._tails[shape] = tail
        return tail

    @cached_property
    def _suffixes(self) -> tuple[str, str]:
        """The text that the template writes after an answer, at the end and before a user's turn."""
        marked = {"role": "assistant", "content": f"Yes{_END}"}
        user, system = {"role": "user", "content": "Well"}, {"role": "system", "content": "Be kind"}
        for front in ([user], [system, user]):
            try:
                last = self.template.render([*front, marked], None, opened=False)
                middle = self.template.render([*front, marked, user], None, opened=False)
            except TemplateError:
                continue
            if _END in last and _END in middle:
                return last.rpartition(_END)[2], middle.rpartition(_END)[2]
        return "", ""

    @cached_property
    def end(self) -> str:
        """The control token that ends an answer; empty if the template writes none."""
        last, middle = self._suffixes
        both = _shared(last, middle)
        shared = [m for m in self._ends.finditer(last) if m.end() <= both]
        match = shared[-1] if shared else self._ends.search(last)
        return match.group() if match else ""

    def bare(self, text: str, *, header: bool = True) -> str:
        """An answer's own text, without the template's text around it.

        Args:
            header: whether it may begin with the template's header of answers.
        """
        before, end, _ = self._suffixes[0].partition(self.end) if self.end else (self._suffixes[0], "", "")
        if not end and (written := self._suffixes[0].strip()):  # a turn that ends with text
            return text.partition(written)[0]
        text = text.removeprefix(self.header) if header else text
        return text.removesuffix(before)

    def _closing(self, tail: str, messages: list[Message], tools: list[Any] | None) -> str:
        """The end of the last turn: from the template's text after the answer, or the next turn's opening."""
        if self.end:
            at = tail.find(self.end)
            match = self._ends.search(tail)
            if at < 0 and match is None:
                return tail + self.end
            return tail[: at + len(self.end)] if at >= 0 else tail[: match.end()] if match else tail
        opener = self._opener(messages, tools)
        if not opener:  # text ends the turn: it carries loss, except for line breaks
            return tail.rstrip() + str(self.tokenizer.eos_token)
        blanks = opener[: len(opener) - len(opener.lstrip())]
        return (tail if tail.endswith(blanks) else tail + blanks) + opener.lstrip()

    def _opener(self, messages: list[Message], tools: list[Any] | None) -> str:
        """For a template without an end of turn: the control token that opens the next turn, with the line
        breaks before it; empty if there is none."""
        if messages[-1].get("tool_calls"):
            result = {"role": "tool", "content": "Done"}
            try:
                before = self.write(messages, tools, opened=False)
                after = self.write([*messages, result], tools, opened=False)
            except TemplateError:
                after = before = ""
            match = self._ends.match(after, len(before)) if after.startswith(before) else None
            if match:
                return match.group()
        middle = self._suffixes[1]
        match = self._ends.match(middle, len(middle) - len(middle.lstrip()))
        return middle[: match.end()] if match else ""

    def _end_inside(self, text: str, end: int, tail: str) -> int:
        """The end of an earlier assistant turn in the full text."""
        closing = tail[: tail.find(self.end) + len(self.end)] if self.end and self.end in tail else ""
        if closing and text.startswith(closing, end):
            return end + len(closing)
        match = self._ends.match(text, end + _shared(tail, text[end:])) or self._ends.match(text, end)
        return match.end() if match else end

    @cached_property
    def header(self) -> str:
        """The template's text between the opened turn and an answer without reasoning."""
        return self._behind_opening({"role": "assistant", "content": _END}).partition(_END)[0]

    @cached_property
    def opens_reasoning(self) -> bool:
        """Whether the opened turn begins with reasoning, which an answer without reasoning has to close."""
        thought = {"role": "assistant", "content": "Yes", "reasoning_content": _END}
        return bool(self.header.strip()) and self._behind_opening(thought).startswith(_END)

    def _behind_opening(self, answer: Message) -> str:
        user = {"role": "user", "content": "Well"}
        try:
            opened = self.template.render([user], None, opened=True)
            text = self.template.render([user, answer], None, opened=False)
        except TemplateError:
            return ""
        return text[len(opened) :] if text.startswith(opened) else ""

    @cached_property
    def stops(self) -> frozenset[str]:
        """Tokens that end an answer or a tool call in this template."""
        function = {"name": "look", "arguments": {"at": "it"}}
        call = {"type": "function", "function": function, "id": "call00001"}
        question: Message = {"role": "user", "content": "Well"}
        messages = [question, {"role": "assistant", "content": "", "tool_calls": [call]}]
        ends = {self.end or self._opener([{}], None).lstrip() or str(self.tokenizer.eos_token)}
        if self.template.has_place_for("tool_calls"):
            try:
                tail = self._tail(messages, None, self.write(messages, None, opened=False))
                written = self._ends.findall(self._closing(tail, messages, None))
                ends |= set(written[-1:])
            except TemplateError:
                pass
        return frozenset(ends)

    @cached_property
    def role_markers(self) -> frozenset[str]:
        """Control tokens and bracketed words (such as [INST]) that the template writes around turns."""
        marked = [{"role": role, "content": _END} for role in ("user", "assistant", "user")]
        try:
            text = self.template.render(marked, None, opened=True)
        except TemplateError:
            return frozenset()
        words = re.findall(r"<\|?[^\s<>|]+\|?>|\[/?[A-Z_]+\]", text)
        return frozenset(words) - self.markers


def _any_of(tokens: frozenset[str] | set[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=lambda t: (-len(t), t))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _matches(pattern: re.Pattern[str], data: Any) -> list[str]:
    """Matches in all strings of a JSON value."""
    if isinstance(data, str):
        return pattern.findall(data)
    parts = data.values() if isinstance(data, dict) else data if isinstance(data, list | tuple) else ()
    return [token for part in parts for token in _matches(pattern, part)]


def _mark(pattern: re.Pattern[str], data: Any) -> Any:
    if isinstance(data, str):
        return pattern.sub(f"{_OPEN}\\g<0>{_CLOSE}", data)
    if isinstance(data, dict):
        return {key: value if key == "role" else _mark(pattern, value) for key, value in data.items()}
    return [_mark(pattern, part) for part in data] if isinstance(data, list) else data


def _mark_ends(data: Any) -> Any:
    """The JSON value with a mark at the end of each string."""
    if isinstance(data, str):
        return data + _END
    if isinstance(data, dict):
        keep = ("type", "id")
        return {key: value if key in keep else _mark_ends(value) for key, value in data.items()}
    return [_mark_ends(part) for part in data] if isinstance(data, list) else data


def _shared(a: str, b: str) -> int:
    """The length of the common prefix of two texts."""
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))


def _shown(text: str) -> str:
    return repr(_MARKS.sub("", text))
