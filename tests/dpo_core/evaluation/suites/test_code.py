"""HumanEval and MBPP on the real problems, with their reference solutions and with wrong ones."""

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dpo_core.data.tokens.config import TokenConfig
from dpo_core.errors import DataError, RecipeError
from dpo_core.evaluation.config import SuiteConfig
from dpo_core.evaluation.model_under_test import ModelUnderTest
from dpo_core.evaluation.sandbox import Limits
from dpo_core.evaluation.suites.code import (
    KS,
    STOPS,
    Problem,
    humaneval_problem,
    mbpp_problem,
    pass_at_k,
    program,
    score,
)
from dpo_core.evaluation.suites.registry import find
from dpo_core.generation.config import SamplingConfig
from tests.support.models.tiny import make_tiny_model
from tests.support.sandboxes import why_no_sandbox

MAKE: dict[str, Callable[[dict[str, Any]], Problem]] = {"humaneval": humaneval_problem, "mbpp": mbpp_problem}
FILES = {"humaneval": "HumanEval.jsonl.gz", "mbpp": "mbpp_sanitized.json.gz"}
BRIEF = Limits(cpu_seconds=1, wall_seconds=20)


@pytest.fixture(scope="module", autouse=True)
def _needs_sandbox() -> None:
    if reason := why_no_sandbox():
        pytest.skip(reason)


@pytest.fixture(params=["humaneval", "mbpp"])
def suite(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def problems(shared: Path, suite: str, most: int | None = None) -> list[Problem]:
    rows = find(suite).read(shared / "data" / "eval" / FILES[suite])
    return [MAKE[suite](row) for row in rows[:most]]


def fenced(problem: Problem) -> str:
    return f"Here it is:\n\n```python\n{problem.stem}{problem.reference}\n```\n\nIt works like this."


# --- pass@k -----------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_choices_with_one_that_passes() -> None:
    for n in range(1, 9):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            choices = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-15)


def test_pass_at_k_is_the_product_of_the_paper_at_its_size() -> None:
    n = 200
    for c, k in itertools.product((0, 1, 7, 100, 150, 200), KS):
        product = 1.0 if n - c < k else 1 - np.prod(1 - k / np.arange(n - c + 1, n + 1))
        assert pass_at_k(n, c, k) == pytest.approx(product, abs=1e-12)


def test_pass_at_k_is_unbiased_where_the_plug_in_is_not() -> None:
    n, k, p = 10, 5, 0.2
    chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    truth = 1 - (1 - p) ** k
    assert sum(q * pass_at_k(n, c, k) for c, q in enumerate(chance)) == pytest.approx(truth, abs=1e-12)
    assert sum(q * (1 - (1 - c / n) ** k) for c, q in enumerate(chance)) < truth - 0.05


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)])
def test_pass_at_k_refuses_what_cannot_be(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, c, k)


# --- real problems ----------------------------------------------------------------------------------------


def test_first_references_pass_as_completions_and_as_blocks(shared: Path, suite: str) -> None:
    first = problems(shared, suite, 10)
    for chat, write in ((False, lambda p: p.reference), (True, fenced)):
        items, counts = score(first, [[write(problem)] for problem in first], chat=chat)
        assert counts == {"passed": 10}
        assert [item.values for item in items] == [{"pass@1": 1.0}] * 10


@pytest.mark.slow
def test_all_references_pass(shared: Path, suite: str) -> None:
    every = problems(shared, suite)
    assert len(every) == {"humaneval": 164, "mbpp": 427}[suite]
    for chat, write in ((False, lambda p: p.reference), (True, fenced)):
        items, counts = score(every, [[write(problem)] for problem in every], chat=chat)
        assert [item.id for item in items if item.values["pass@1"] < 1] == []
        assert counts == {"passed": len(every)}


@pytest.mark.slow
def test_no_constant_passes_for_a_solution(shared: Path, suite: str) -> None:
    """A function that returns None, and one that leaves with status 0 while the tests call it."""
    every = problems(shared, suite)
    for wrong in ("return None", "import os; os._exit(0)"):
        answers = []
        for problem in every:
            defined = re.findall(r"^def (\w+) *\(", problem.stem + problem.reference, re.MULTILINE)
            bodies = [f"def {name}(*args, **kwargs):\n    {wrong}\n" for name in defined]
            answers.append([f"```python\n{chr(10).join(bodies)}```"])
        _, counts = score(every, answers, chat=True)
        assert counts == {"failed": len(every)}


def test_wrong_answers_fail_each_in_its_way(shared: Path, suite: str) -> None:
    problem = problems(shared, suite, 1)[0]
    name = problem.name or "similar_elements"
    wrong = {
        "failed": [
            f"```python\ndef {name}(*args):\n    return 7\n```",
            "```python\nimport sys; sys.exit(0)\n```",
        ],
        "timeout": [f"```python\ndef {name}(*args):\n    while True: pass\n```"],
        "no code": ["", "```python\n```", "```\nI cannot do that.\n```", f"```python\ndef {name}(:\n```"],
    }
    answers = [answer for group in wrong.values() for answer in group]
    items, counts = score([problem], [answers], chat=True, limits=BRIEF)
    assert counts == {end: len(group) for end, group in wrong.items()}
    assert items[0].values == {"pass@1": 0.0}


def test_samples_of_one_problem_make_pass_at_1_and_10(shared: Path, suite: str) -> None:
    first = problems(shared, suite, 2)
    right, wrong = fenced(first[0]), "```python\nx = 1\n```"
    items, counts = score(first, [[right] * 3 + [wrong] * 9, [wrong] * 12], chat=True)
    assert counts == {"passed": 3, "failed": 21}
    assert items[0].values["pass@1"] == pytest.approx(3 / 12)
    assert items[0].values["pass@10"] == pytest.approx(1 - math.comb(9, 10) / math.comb(12, 10))
    assert items[1].values == {"pass@1": 0.0, "pass@10": 0.0}
    assert (items[0].id, items[0].cluster) == (first[0].id, first[0].id)


def test_mbpp_items_tell_the_test_split(shared: Path) -> None:
    splits = [problem.split for problem in problems(shared, "mbpp")]
    assert {split: splits.count(split) for split in splits} == {
        "prompt": 7, "test": 257, "valid": 43, "train": 120,
    }  # fmt: skip


# --- extraction -------------------------------------------------------------------------------------------

STEM = 'import math\n\ndef area(r):\n    """Of a circle."""\n'
CIRCLE = Problem(
    "c", "area", STEM, "", STEM, "assert round(area(1), 2) == 3.14", "    return math.pi * r**2\n"
)
SQUARE = Problem("s", "", "[BEGIN]\n", "", "", "assert square(3) == 9", "def square(x):\n    return x * x\n")


@pytest.mark.parametrize(
    ("problem", "answer", "chat"),
    [
        (CIRCLE, "    return math.pi * r**2\n\ndef broken(:\n", False),
        (CIRCLE, "    return math.pi * r**2\nprint(area('x'))\n", False),
        (CIRCLE, "    return math.pi * r**2\n# and now\n1 / 0", False),
        (CIRCLE, "   x = r * r\n    return math.pi * x\n", False),
        (CIRCLE, "```python\ndef area(r):\n    return 3.1416 * r**2```", False),
        (CIRCLE, "    return math.pi * r**2\n\n\nif True:\n    1 / 0\n", True),
        (CIRCLE, "```\n    return math.pi * r**2\n```", True),
        (CIRCLE, "def area(r):\n    return math.pi * r**2\n", True),
        (CIRCLE, "First\n```sh\nls\n```\nthen\n```py\ndef area(r):\n    return math.pi * r**2\n```", True),
        (CIRCLE, "Cut off:\n```python\ndef area(r):\n    return math.pi * r**2", True),
        (SQUARE, "def square(x):\n    return x * x\n[DONE]\nNow the next task: (", False),
        (SQUARE, "```python\ndef square(x):\n    return x * x\n```\n[DONE]", False),
        (SQUARE, "```\ndef square(x):\n    return x * x\n```\n```\nsquare(\n```", True),
        (SQUARE, "def square(x):\n    return x * x\n", True),
    ],
)
def test_code_is_found_in_the_answer(problem: Problem, answer: str, chat: bool) -> None:
    code = program(problem, answer, chat)
    assert code is not None
    # Written here, not by a model.
    exec(compile(code, "program", "exec"), {})


def test_a_completion_that_goes_on_after_a_fence_is_no_block() -> None:
    code = program(CIRCLE, "    return math.pi * r**2\n```\nThis returns the area.\n```", chat=False)
    assert code is not None
    assert "This returns" in code  # no Python, and counted as such: nothing was asked in fences


# --- the suites -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=2048)


def test_a_model_that_knows_nothing_passes_nothing(shared: Path, suite: str, model: Path) -> None:
    code_suite = find(suite)
    rows = code_suite.read(shared / "data" / "eval" / FILES[suite])
    config = SuiteConfig(
        limit=3, samples=10, run_code=True, sampling=SamplingConfig(max_new_tokens=8, precision="fp32")
    )
    subject = ModelUnderTest(model, "tiny", TokenConfig(max_length=600))
    outcome = code_suite.run(subject, rows, config)
    assert len({item.id for item in outcome.items}) == 3
    assert [item.values for item in outcome.items] == [{"pass@1": 0.0, "pass@10": 0.0}] * 3
    assert [spec.name for spec in outcome.specs] == ["pass@1", "pass@10"]
    counts = outcome.facts["answers"]
    assert isinstance(counts, dict)
    assert sum(n for n in counts.values() if isinstance(n, int)) == 30
    assert "passed" not in counts
    assert "fenced block" in str(outcome.settings["prompt"])  # the tiny model has a chat template
    completion = config.model_copy(update={"chat": "never", "samples": 1})
    outcome = code_suite.run(subject, rows, completion)
    assert "cut at" in str(outcome.settings["prompt"])
    json.dumps(outcome.model_dump(mode="json"))


def test_prompts_that_do_not_fit_are_counted(shared: Path, model: Path) -> None:
    humaneval = find("humaneval")
    rows = humaneval.read(shared / "data" / "eval" / FILES["humaneval"])[:3]
    config = SuiteConfig(run_code=True, sampling=SamplingConfig(max_new_tokens=8))
    outcome = humaneval.run(
        ModelUnderTest(model, "t", TokenConfig(max_length=64, max_prompt_length=32)), rows, config
    )
    assert outcome.facts["prompts cut from the left"] == 3


def test_code_runs_only_where_it_was_allowed(suite: str, model: Path) -> None:
    with pytest.raises(RecipeError, match=r"runs code.*--run-code"):
        find(suite).run(ModelUnderTest(model, "tiny"), [], SuiteConfig())


def test_a_row_without_its_tests_is_refused(tmp_path: Path, suite: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"task_id": "x", "prompt": "y"}) + "\n")
    with pytest.raises(DataError, match=r"row 1 of .*rows\.jsonl has no (entry_point|task_id)"):
        find(suite).read(file)


def test_prompt_and_stops_are_those_of_the_harness(shared: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")

    class Loader(yaml.SafeLoader):
        """Passes over the harness's own tags."""

    Loader.add_constructor("!function", lambda loader, node: str(node.value))
    tasks = Path(lm_eval.__file__).parent / "tasks"
    humaneval = yaml.load((tasks / "humaneval" / "humaneval.yaml").read_text(), Loader)
    assert tuple(sorted(humaneval["generation_kwargs"]["until"])) == tuple(sorted(STOPS))
    assert humaneval["doc_to_text"] == "{{prompt}}"
    mbpp = yaml.load((tasks / "mbpp" / "mbpp.yaml").read_text(), Loader)
    row = next(r for r in find("mbpp").read(shared / "data/eval" / FILES["mbpp"]) if len(r["test_list"]) == 3)
    prompt = mbpp["doc_to_text"].replace("{{text}}", row["prompt"])
    for i, test in enumerate(row["test_list"]):
        prompt = prompt.replace(f"{{{{test_list[{i}]}}}}", test)
    assert mbpp_problem(row).text == prompt
