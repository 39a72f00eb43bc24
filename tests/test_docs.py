"""The README and the docs: links, anchors, paths and commands that exist, and a README that stays short."""

import json
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from dpo_core.data.formats import recognise
from dpo_core.data.layouts.messages import chat_prompt
from dpo_core.rewards.functions import check_reward, load_reward
from flows.cli.main import app
from tasks.recipe.read import load_recipe, shipped_recipes
from tests.support import docs_pages

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


@pytest.mark.parametrize("name", docs_pages.PAGES)
def test_a_generated_page_is_up_to_date(name: str) -> None:
    """Renew it: python -m tests.support.docs_pages."""
    assert (docs_pages.DOCS / name).read_text() == docs_pages.PAGES[name]()


def test_no_help_text_is_broken_inside_a_paragraph() -> None:
    for name, command in docs_pages.listed_commands():
        assert [text for text in command.help.strip().split("\n\n") if "\n" in text.strip()] == [], name


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
    text = block + "`dpo config rm` `dpo ui`"
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


@each_page
def test_recipes_and_overrides_in_fenced_blocks_are_valid(page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)):
        if block.startswith("name: "):
            path = tmp_path / f"{number}.yaml"
            path.write_text(block)
            load_recipe(str(path))
    for line in _commands(text):
        words = shlex.split(line, comments=True)
        sets = [value for option, value in pairwise(words) if option == "--set"]
        if words[1] in ("run", "plan") and words[2:] and words[2] in shipped_recipes() and "…" not in line:
            load_recipe(words[2], sets)


@each_page
def test_commands_that_only_print_work(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("support.yaml").write_text(f"name: support\ndata: {{path: {tmp_path / 'support.jsonl'}}}\n")
    for line in _commands(page.read_text()):
        command = line.partition(">")[0].partition("#")[0]  # without redirection and comment
        words = shlex.split(command)[1:]
        if re.match(r"dpo (config|objectives|methods|evaluate$)", command) and not re.search(
            "[A-Z]", command
        ):
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, (line, done.exception)


def test_the_example_of_a_reward_scores_text_and_conversations(tmp_path: Path) -> None:
    text = (ROOT / "flows" / "docs" / "data.md").read_text()
    (example,) = re.findall(r"^  ```python\n(.*?)^  ```$", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.py").write_text(dedent(example))
    source = f"{tmp_path / 'mine.py'}:score"
    check_reward(source)
    chat = chat_prompt([{"role": "user", "content": "My order?"}])
    assert load_reward(source)(["My order?", chat, "Hi"], ["sorry", "sorry", "sorry"]) == [1, 1, 0]
