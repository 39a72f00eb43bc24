"""Renders a tokenizer's chat template: the text that a conversation becomes.

The environment is that of transformers' `apply_chat_template`, except for the clock: a template that writes
the date or the time gets the same moment in every rendering. Templates come from strangers; they run in
Jinja's sandbox, and `check_template` runs each once in a process that can be ended.
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

from dpo_core.errors import ModelError

Message = dict[str, Any]

# Names of the time that templates read; transformers gives them `strftime_now`.
_CLOCK = re.compile(r"\b(?:strftime_now|datetime|now)\b")
# Names under which a message carries its reasoning: each is given to templates that read another.
REASONING = ("reasoning_content", "thinking", "reasoning")
SECONDS = 20.0


class TemplateError(ModelError):
    """The chat template cannot write a conversation, or writes it so that it cannot be trained on."""


def reads_clock(source: str) -> bool:
    """Whether a template's text asks for the time."""
    return bool(_CLOCK.search(source))


def source_of(tokenizer: Any, tools: bool = False) -> str | None:
    """The text of a tokenizer's chat template; of several named ones that for tools, or the default."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return template.get("tool_use" if tools and "tool_use" in template else "default")
    return template or None


def template_in(folder: Path) -> str | None:
    """The text of the chat templates in a checkpoint's folder, None without; nothing is loaded."""
    file = folder / "chat_template.jinja"
    named = [*folder.glob("additional_chat_templates/*.jinja"), *([file] if file.is_file() else [])]
    found = [path.read_text(encoding="utf-8") for path in named]
    try:
        inside = json.loads((folder / "tokenizer_config.json").read_bytes()).get("chat_template")
    except (OSError, ValueError):
        inside = None
    found += [inside] if isinstance(inside, str) else [str(one.get("template")) for one in inside or ()]
    return "\n".join(found) or None


class ChatTemplate:
    """One template at one moment.

    Args:
        source: the template's text.
        variables: the special tokens by name, and the user's `tokens.template_arguments`.
        day: the date that the template reads; midnight of it is the time.
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
            opened: whether the template's beginning of an assistant's turn follows (its generation prompt).

        Raises:
            TemplateError: the template refuses the conversation, or is broken.
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
                f"the chat template cannot write a conversation of the roles {roles}: {error}",
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
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`, which marks what the assistant wrote; its text is written as it is."""

        tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class Namespace(jinja2.utils.Namespace):
        """Without attributes that reach into Python."""

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
    """Refuse a template that is no Jinja, or that does not come to an end.

    Another process writes a small conversation with it: only a process can be stopped in whatever it does.

    Raises:
        TemplateError: it is not valid, or took longer than `seconds` or more memory than 2 GiB.
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
            "It loops: correct it, or set model.chat_template to another",
        ) from error
    if done.returncode:
        raise TemplateError(
            "the chat template exhausted the memory on three short messages",
            "Correct it, or set model.chat_template to another",
        )


# Whether the template accepts the conversation is not the question here: the data decides that.
_TRIAL = """
import resource, sys
sys.path[:] = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from dpo_core.data.tokens.chat_template import trial
trial(sys.stdin.buffer.read().decode())
"""


def trial(source: str) -> None:
    """Write small conversations, in the process of `check_template`."""
    turns = [{"role": role, "content": "Hi"} for role in ("user", "assistant", "user")]
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, date(2000, 1, 1))
    for messages, opened in ((turns[:1], True), (turns[:2], False), (turns, True)):
        try:
            template.render(messages, None, opened=opened)
        except TemplateError as error:
            if isinstance(error.__cause__, MemoryError | OverflowError):
                sys.exit(1)
