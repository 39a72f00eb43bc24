"""The README and the docs: links, anchors, paths and commands that exist, and a README that stays short."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from dpo_core.data.formats import recognise
from flows.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
CHAPTERS = sorted((ROOT / "flows" / "docs").glob("*.md"))
PAGES = [README, ROOT / "deploy" / "README.md", *CHAPTERS]
FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FOLDERS = "dpo_core|expectations|tasks|flows|deploy|tests"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def _anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _broken_links(text: str, folder: Path) -> list[str]:
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+://", link):
            continue
        target = folder / path if path else None
        if (target and not target.exists()) or (
            anchor and anchor not in _anchors(target.read_text() if target else text)
        ):
            broken.append(link)
    return broken


def _commands(text: str) -> Iterator[str]:
    """Every `dpo ...` line of the fenced blocks, and every `dpo ...` in the prose."""
    for block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if match := re.match(r"(?:\$ )?(?:\.venv/bin/)?(dpo .*)", line):
                yield match[1]
    yield from re.findall(r"`(dpo [^`\n]*)`", FENCE.sub("", text))


def _unknown(line: str) -> str | None:
    """The first command or option of a line that the command line does not have."""
    command: Any = typer.main.get_command(app)
    for word in shlex.split(line, comments=True)[1:]:
        if word.startswith("-"):
            known = [name for p in command.params for name in (*p.opts, *p.secondary_opts)]
            if word.partition("=")[0] not in (*known, "--help"):
                return word
        elif hasattr(command, "commands"):
            if word not in command.commands and word != "COMMAND":
                return word
            command = command.commands.get(word, command)
    return None


@each_page
def test_links_and_anchors_exist(page: Path) -> None:
    assert _broken_links(page.read_text(), page.parent) == []


@each_page
def test_commands_and_options_exist(page: Path) -> None:
    unknown = {line: word for line in _commands(page.read_text()) if (word := _unknown(line))}
    assert unknown == {}


@each_page
def test_files_of_the_repository_exist(page: Path) -> None:
    text = page.read_text()
    paths = set(re.findall(rf"(?<![\w/.])(?:{FOLDERS})/[\w/.-]*\w", text))
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    missing = {path for path in paths if not (ROOT / path).exists()} - {"deploy/docker/.env"}  # the reader's
    assert missing | (set(re.findall(r"test_\w+\.py", text)) - tests) == set()


def test_a_wrong_link_anchor_command_and_option_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("## Words, here\n")
    text = "[a](a.md#words-here) [b](b.md) [c](a.md#nowhere) [d](#top)\n# Top\n[e](#end) ![f](f.png)"
    assert _broken_links(text, tmp_path) == ["b.md", "a.md#nowhere", "#end", "f.png"]
    block = "```console\n$ dpo run x --sett a=1    # --none\n$ dpo walk\n$ dpo gc \\\n    --kept 3\n```\n"
    text = block + "`dpo cache rm` `dpo ui`"
    assert [_unknown(line) for line in _commands(text)] == ["--sett", "walk", "--kept", "rm", None]


def test_the_readme_is_short_and_leads_to_every_chapter() -> None:
    text = README.read_text()
    assert len(text.encode()) <= 11_000
    assert [chapter.name for chapter in CHAPTERS if f"(flows/docs/{chapter.name}" not in text] == []


def test_every_shipped_recipe_is_described() -> None:
    text = (ROOT / "flows" / "docs" / "operation.md").read_text()
    table = text.partition("## Shipped recipes")[2].partition("\n## ")[0]
    assert [
        path.stem for path in (ROOT / "flows/recipes").glob("*.yaml") if f"`{path.stem}`" not in table
    ] == []


def test_each_row_of_the_readme_is_recognised_as_its_format() -> None:
    rows = re.findall(r"^\| ([\w-]+) \| `(\{\".*\})` \|$", README.read_text(), re.MULTILINE)
    assert len(rows) == 7
    for name, row in rows:
        assert recognise([json.loads(row)])[0] == name
