"""The docs pages that are generated: `python -m tests.support.docs_pages` writes them anew."""

from pathlib import Path
from typing import Any

import typer.main

from dpo_core.methods.registry import methods
from flows.cli.main import app
from flows.commands.methods import default

DOCS = Path(__file__).resolve().parents[2] / "flows" / "docs"

_INTRODUCTION = """\
# Commands

Every command with its arguments and options, as `dpo COMMAND --help` prints them.
The program is `.venv/bin/dpo`; `. .venv/bin/activate` puts it on the path.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 2 | usage or recipe error |
| 3 | the data gate refused the data |
| 4 | a stage failed (`dpo run` prints the line that resumes the run), or a check found damage |
| 5 | promotion or rollback refused |
| 130, 143, 129 | stopped by Ctrl-C, SIGTERM, SIGHUP |

An expected error is one line on stderr. Tracebacks go to `dpo-<uid>.log` in the temporary folder.
"""


def commands_page() -> str:
    """`commands.md`: every command, the subcommands of groups included."""
    return _INTRODUCTION + "".join(_section(name, command) for name, command in listed_commands())


def listed_commands() -> list[tuple[str, Any]]:
    """All commands with their names."""
    return _commands(typer.main.get_command(app), "dpo")


def _commands(group: Any, prefix: str) -> list[tuple[str, Any]]:
    listed: list[tuple[str, Any]] = []
    for name, command in group.commands.items():
        full = f"{prefix} {name}"
        listed += _commands(command, full) if hasattr(command, "commands") else [(full, command)]
    return listed


def _section(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = [name, *(_argument(p) if p.required else f"[{_argument(p)}]" for p in arguments)]
    paragraphs = [" ".join(paragraph.split()) for paragraph in (command.help or "").split("\n\n")]
    lines = [f"## {name}", f"`{' '.join(usage)}`", *paragraphs]
    rows = [f"| `{_argument(p)}` | {_meaning(p)} |" for p in arguments]
    rows += [f"| `{_option(p)}` | {_meaning(p)} |" for p in command.params if p not in arguments]
    if rows:
        lines.append("\n".join(["| | |", "| --- | --- |", *rows]))
    return "\n" + "\n\n".join(lines) + "\n"


def _argument(parameter: Any) -> str:
    return (parameter.metavar or parameter.name.upper()) + ("…" if parameter.nargs == -1 else "")


def _option(parameter: Any) -> str:
    value = "" if parameter.is_flag else f" {parameter.metavar or parameter.name.upper()}"
    return "`, `".join([parameter.opts[0] + value, *parameter.secondary_opts])


def _meaning(parameter: Any) -> str:
    """The help of a parameter, with its default where that is a value."""
    text = " ".join((parameter.help or "").split()).replace("|", "\\|")
    if parameter.envvar:
        text += f" Environment variable: `{parameter.envvar}`."
    if parameter.default in (None, "", False):
        return text
    default = parameter.opts[0] if parameter.default is True else parameter.default
    return f"{text} Default: `{default}`."


def methods_page() -> str:
    """`methods.md`: every method with its needs and settings."""
    lines = [
        "# Methods",
        "",
        "The methods of a recipe's policies, as `dpo methods` lists them. Each method is one file in "
        "`dpo_core/methods/`, which declares its settings, the data that it learns from, how it reads the "
        "reference, and its curves on the run page. Its trainer is the file of the same name in "
        "`dpo_core/trainers/`, and its estimate for `dpo plan` is in `dpo_core/estimates/by_method.py`.",
    ]
    for method in methods().values():
        needs = ", ".join(method.needs(method.settings()))
        use = (
            f"`policies: {{NAME: {{method: {method.name}}}}}`"
            if method.policy
            else "Not for policies: used by the run itself, or as a job of its own."
        )
        lines += [
            "",
            f"## {method.name}",
            "",
            f"{method.title}. {method.citation}.",
            "",
            f"Needs: {needs}. {use}",
        ]
        lines += ["", "| setting | default | |", "| --- | --- | --- |"]
        for name, field in method.settings.model_fields.items():
            text = " ".join((field.description or "").split()).replace("|", "\\|")
            lines.append(f"| `{name}` | `{default(field)}` | {text} |")
    return "\n".join(lines) + "\n"


PAGES = {"commands.md": commands_page, "methods.md": methods_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
