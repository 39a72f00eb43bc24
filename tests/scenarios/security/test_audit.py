"""The audit tells an answer from silence; the list of parts names every locked package."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[3]
TOOLS = REPO / "build" / "tools" / "bin"
SKIPPED = {"name": "a", "skip_reason": "Dependency not found on PyPI and could not be audited: a (1)"}
SOUND = {"name": "b", "version": "2", "vulns": []}
FAULT = {"id": "PYSEC-1", "aliases": ["CVE-2"], "fix_versions": ["3.1"]}
BAD = {"name": "c", "version": "3", "vulns": [FAULT]}


@pytest.fixture
def audit() -> ModuleType:
    place = importlib.util.spec_from_file_location("audit", REPO / ".ci" / "audit.py")
    assert place is not None
    assert place.loader is not None
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return module


def tool(folder: Path, answers: dict[str, Any]) -> str:
    """A command that answers as pip-audit does, by the service that it is told to ask."""
    path = folder / "pip-audit"
    path.write_text(
        f"#!{sys.executable}\nimport sys, json\nanswers = json.loads({json.dumps(json.dumps(answers))})\n"
        "given = answers[sys.argv[sys.argv.index('--vulnerability-service') + 1]]\n"
        "if given is None:\n    sys.exit('requests.exceptions.ConnectionError: no such host')\n"
        "print(json.dumps({'dependencies': given, 'fixes': []}))\n"
    )
    path.chmod(0o700)
    return str(path)


@pytest.mark.parametrize(
    ("osv", "pypi", "code", "words"),
    [
        (None, None, 0, "NOTHING WAS AUDITED"),
        (None, [SKIPPED, SKIPPED], 0, "NOTHING WAS AUDITED"),
        ([SOUND, SKIPPED], None, 0, "looked at 1 of 2 packages\naudit: no known vulnerability"),
        (None, [SOUND, BAD], 1, "c 3: PYSEC-1, mended in 3.1"),
        ([SKIPPED], [BAD], 1, "pypi looked at 1 of 1"),
    ],
)
def test_silence_is_no_answer_and_a_vulnerability_fails(
    osv: Any, pypi: Any, code: int, words: str, audit: ModuleType, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert audit.main(tool(tmp_path, {"osv": osv, "pypi": pypi})) == code
    assert words in capsys.readouterr().out


def test_what_is_accepted_is_named_by_any_of_its_names(audit: ModuleType) -> None:
    assert audit.judge({"dependencies": [SOUND, BAD]}, {"CVE-2"}) == (2, [])
    assert len(audit.judge({"dependencies": [SOUND, BAD]}, {"CVE-3"})[1]) == 1


@pytest.mark.slow
def test_the_list_of_parts_is_whole_and_of_its_schema() -> None:
    made = subprocess.run(["make", "sbom"], cwd=REPO, capture_output=True, text=True, check=False)
    if not (TOOLS / "cyclonedx-py").exists():
        pytest.skip(f"the tools could not be installed: {made.stderr[-300:]}")
    assert made.returncode == 0, made.stderr
    text = (REPO / "build" / "sbom.json").read_text()
    check = (
        "import sys\nfrom cyclonedx.schema import SchemaVersion\nfrom cyclonedx.validation.json import "
        "JsonStrictValidator\nsys.exit(str(JsonStrictValidator(SchemaVersion.V1_6)"
        ".validate_str(sys.stdin.read()) or '') or 0)"
    )
    for given, sound in ((text, True), (text.replace('"library"', '"librarian"'), False)):
        done = subprocess.run(
            [TOOLS / "python", "-c", check], input=given, text=True, capture_output=True, check=False
        )
        assert (done.returncode == 0) is sound, done.stderr
    locked = dict(line.split("==") for line in (REPO / "constraints.txt").read_text().split())
    facts = json.loads(text)
    assert {part["name"]: part["version"] for part in facts["components"]} == locked
    assert facts["metadata"]["component"]["name"] == "dpo-pipeline"
