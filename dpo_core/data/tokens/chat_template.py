"""Renders conversations as text with a tokenizer's chat template, in a sandbox and with a fixed date.

The environment is that of transformers' `apply_chat_template`, except for the clock: a template that writes
the date or the time gets the same moment in every rendering. Templates are untrusted: they run in Jinja's
sandbox, and `check_template` runs each once in a process with time and memory limits.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import date, datetime, time
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dpo_core.errors import ModelError

Message = dict[str, Any]

# Names of a message's reasoning in different templates; a message is rendered with all of them.
REASONING = ("reasoning_content", "thinking", "reasoning")
SECONDS = 20.0


class TemplateError(ModelError):
    """The chat template cannot write a conversation, or not in a form that can be trained on."""


def source_of(tokenizer: Any, tools: bool = False) -> str | None:
    """The text of a tokenizer's chat template; of several named ones, the one for tools or the default."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return template.get("tool_use" if tools and "tool_use" in template else "default")
    return template or None


def template_in(folder: Path) -> str | None:
    """The text of all chat templates in a checkpoint's folder, without loading the tokenizer; None if
    none."""
    file = folder / "chat_template.jinja"
    named = [*folder.glob("additional_chat_templates/*.jinja"), *([file] if file.is_file() else [])]
    texts = [path.read_text(encoding="utf-8") for path in named]
    try:
        inside = json.loads((folder / "tokenizer_config.json").read_bytes()).get("chat_template")
    except (OSError, ValueError):
        inside = None
    texts += [inside] if isinstance(inside, str) else [str(named.get("template")) for named in inside or ()]
    return "\n".join(texts) or None


class ChatTemplate:
    """A template with its variables and a fixed date.

    Args:
        source: the template's text.
        variables: the special tokens by name, and the user's `tokens.template_arguments`.
        day: the date that the template reads; the time is midnight.
    """

    def __init__(self, source: str, variables: Mapping[str, Any], day: date) -> None:
        self.source, self.variables, self.day = source, dict(variables), day
        try:
            self._template = _environment().from_string(source)
        except Exception as error:
            raise TemplateError(
                f"the chat template is not valid Jinja: {error}",
                "Correct it, or set model.chat_template to another",
            ) from error

    def render(self, messages: list[Message], tools: list[Any] | None, *, opened: bool) -> str:
        """The text of a conversation.

        Args:
            opened: whether to append the opening of an assistant's turn (the generation prompt).

        Raises:
            TemplateError: the template refuses the conversation, or fails.
        """
        moment = datetime.combine(self.day, time())
        try:
            return self._template.render(
                messages=[_with_reasoning(m) for m in messages],
                tools=tools or None,
                documents=None,
                add_generation_prompt=opened,
                strftime_now=moment.strftime,
                **self.variables,
            )
        except Exception as error:
            roles = ", ".join(str(m.get("role")) for m in messages[:8])
            raise TemplateError(
                f"the chat template cannot write a conversation with the roles {roles}: {error}",
                "Set tokens.template to transcript, or model.chat_template to another template",
            ) from error

    def has_place_for(self, key: str) -> bool:
        """Whether the template reads a part of a message, or `tools`."""
        names = REASONING if key in REASONING else (key,)
        return any(re.search(rf"\b{name}\b", self.source) for name in names)


def _with_reasoning(message: Message) -> Message:
    message = {key: value for key, value in message.items() if value is not None}
    thought = next((message[name] for name in REASONING if name in message), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


@lru_cache(maxsize=1)
def _environment() -> Any:
    class Generation(jinja2.ext.Extension):
        """`{% generation %}`, which marks the assistant's text; the text is written unchanged."""

        tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class Namespace(jinja2.utils.Namespace):
        """A namespace that refuses attributes with access to Python internals."""

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")
            super().__setitem__(name, value)

    def namespace(*args: Any, **attributes: Any) -> Any:
        made = Namespace()
        for name, value in dict(*args, **attributes).items():
            made[name] = value
        return made

    def make_dict(*args: Any, **entries: Any) -> dict[Any, Any]:
        return dict(*args, **entries)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "dict": make_dict, "namespace": namespace}
    return environment


def check_template(source: str, seconds: float = SECONDS) -> None:
    """Check that a template is valid and terminates.

    It renders a small conversation in another process, because only a process can be stopped at any time.

    Raises:
        TemplateError: the template is invalid, takes longer than `seconds`, or needs more than 2 GiB of
        memory.
    """
    ChatTemplate(source, {}, date(2000, 1, 1))
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _TRIAL, *sys.path],
            input=source.encode(),
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TemplateError(
            f"the chat template did not write three short messages within {seconds:g} s",
            "Correct the endless loop, or set model.chat_template to another",
        ) from error
    if done.returncode:
        raise TemplateError(
            "the chat template ran out of memory on three short messages",
            "Correct it, or set model.chat_template to another",
        )


# The trial does not test whether the template accepts the conversation; that depends on the data.
_TRIAL = """
import resource, sys
sys.path[:] = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from dpo_core.data.tokens.chat_template import trial
trial(sys.stdin.buffer.read().decode())
"""


def trial(source: str) -> None:
    """Render small conversations; runs in the process of `check_template`."""
    turns = [{"role": role, "content": "Hi"} for role in ("user", "assistant", "user")]
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, date(2000, 1, 1))
    for messages, opened in ((turns[:1], True), (turns[:2], False), (turns, True)):
        try:
            template.render(messages, None, opened=opened)
        except TemplateError as error:
            if isinstance(error.__cause__, MemoryError | OverflowError):
                sys.exit(1)
