"""HumanEval and MBPP: the share of generated programs that pass the tests, as unbiased pass@k.

HumanEval: Chen et al. 2021 (arXiv 2107.03374), 164 functions to complete. MBPP: Austin et al. 2021
(arXiv 2108.07732), the 427 tasks whose wording was checked by hand. Generated code runs only in `sandbox`,
and only if the user allows it.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_core.data.files.read import read_rows
from dpo_core.errors import DataError, RecipeError
from dpo_core.evaluation.config import SuiteConfig
from dpo_core.evaluation.prompt import Prompt, as_prompt
from dpo_core.evaluation.results import Item, MeasureSpec, Outcome
from dpo_core.evaluation.sandbox import Limits, ProgramResult, check_sandbox, run_many
from dpo_core.evaluation.suites.base import Run, Suite
from dpo_core.evaluation.suites.chat_or_text import wants_chat
from dpo_core.evaluation.suites.rows import Row, sample_rows
from dpo_core.ranks import Ranks, SingleRank

if TYPE_CHECKING:
    from dpo_core.evaluation.model_under_test import ModelUnderTest

KS = (1, 10, 100)
LIMITS = Limits()
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""End of a completion of HumanEval: a line that starts like this is not part of the function's body."""
DONE = "[DONE]"
"""End of a solution of MBPP in the paper's prompt."""
_PROGRAMS = 32  # in one unit of work; several of them run at once
_NO_CODE = ("SyntaxError", "IndentationError", "TabError")


@dataclass(frozen=True)
class Problem:
    """One task.

    Args:
        name: the function that the tests call; empty if the row does not name it.
        text: the prompt for a base model.
        instruction: the same as a user's turn.
        stem: the program's text before the completion; empty if the answer is the full program.
        tests: the program's text after the completion.
        split: part of the data set that the task belongs to.
    """

    id: str
    name: str
    text: str
    instruction: str
    stem: str
    tests: str
    reference: str
    split: str = ""


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that one of k answers passes, if c of n samples pass: 1 - C(n-c, k) / C(n, k).

    Unbiased (Chen et al. 2021, equation 1), unlike 1 - (1 - c/n)^k, which is too small.

    Raises:
        ValueError: not 0 <= c <= n, or not 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {c} among {n} answers")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def humaneval_problem(row: Row) -> Problem:
    return Problem(
        id=row["task_id"],
        name=row["entry_point"],
        text=row["prompt"],
        instruction="Complete the following Python function. Answer with the whole function, its imports "
        f"included, in one ```python block.\n\n```python\n{row['prompt'].rstrip()}\n```",
        stem=row["prompt"],
        tests=f"{row['test']}\ncheck({row['entry_point']})\n",
        reference=row["canonical_solution"],
    )


def mbpp_problem(row: Row) -> Problem:
    tests = "\n".join(row["test_list"])
    task = (
        f"You are an expert Python programmer, and here is your task: {row['prompt']} "
        f"Your code should pass these tests:\n\n{tests}\n"
    )
    number = int(row["task_id"])
    # The parts of the paper: few-shot examples, test, validation, training.
    split = "prompt" if number <= 10 else "test" if number <= 510 else "valid" if number <= 600 else "train"
    return Problem(
        id=f"MBPP/{number}",
        name="",
        text=f"{task}[BEGIN]\n",
        instruction=f"{task}\nAnswer with the code in one ```python block.",
        stem="",
        tests="\n".join([*row["test_imports"], tests, ""]),
        reference=row["code"],
        split=split,
    )


# --- from an answer to a program --------------------------------------------------------------------------


def program(problem: Problem, answer: str, chat: bool) -> str | None:
    """The program of an answer, with the code that its tests need; None if the answer has no code.

    In a chat it is the first fenced block that defines the function, or else the first block. Without a
    fence, and for a completion that does not start with one, it is the answer up to a stop.
    """
    block = _block(answer, problem.name) if chat or answer.lstrip().startswith("```") else None
    code = answer if block is None else block
    complete = not problem.stem or ((chat or block is not None) and _defines(code, problem.name))
    if block is None:
        code = _until(code, (DONE,) if complete else STOPS)
    if not code.strip():
        return None
    if complete:
        # The prompt is a function with a docstring: its imports and helpers stay, the answer redefines it.
        return f"{problem.stem}\n{code}\n{problem.tests}"
    # Some tokenizers drop the first space of what they decode; three spaces are never right in a body here.
    code = f" {code}" if re.match(r" {3}\S", code) else code
    return f"{problem.stem}{code}\n{problem.tests}"


def _block(text: str, name: str) -> str | None:
    """A fenced block, even if the end of the answer cuts it off."""
    blocks: list[str] = re.findall(r"^ *```[^\n`]*\n(.*?)(?:```|\Z)", text, re.DOTALL | re.MULTILINE)
    return next((block for block in blocks if _defines(block, name)), blocks[0] if blocks else None)


def _defines(code: str, name: str) -> bool:
    return re.search(rf"^(async )?def {re.escape(name) or '.'}", code, re.MULTILINE) is not None


def _until(text: str, stops: Sequence[str]) -> str:
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


# --- the suites -------------------------------------------------------------------------------------------


def score(
    problems: Sequence[Problem],
    answers: Sequence[Sequence[str]],
    *,
    chat: bool,
    limits: Limits = LIMITS,
    threads: int | None = None,
    ranks: Ranks | None = None,
) -> tuple[list[Item], Counter[str]]:
    """Run every answer against its tests, equal programs once.

    Args:
        answers: of each problem; all have the same number.
        threads: sandboxes at once on each rank; None: by the number of processors and ranks.
        ranks: share the programs; None: this process runs all.

    Returns:
        One item per problem, and the number of answers by outcome: `passed`, `failed`, `timeout`, `killed`,
        `output`, or `no code` (nothing to run, or not Python).
    """
    programs = [
        [program(problem, answer, chat) for answer in own]
        for problem, own in zip(problems, answers, strict=True)
    ]
    different = list(dict.fromkeys(code for own in programs for code in own if code is not None))
    outcomes = _run_shared(different, limits, threads, ranks or SingleRank())
    items, counts = [], Counter[str]()
    for problem, own, texts in zip(problems, programs, answers, strict=True):
        results = [outcomes[code] if code is not None else "no code" for code in own]
        counts.update(results)
        passed = results.count("passed")
        items.append(
            Item(
                id=problem.id,
                cluster=problem.id,
                subset=problem.split,
                prompt=problem.text,
                answer=texts[0],
                values={f"pass@{k}": pass_at_k(len(results), passed, k) for k in KS if k <= len(results)},
            )
        )
    return items, counts


def _run_shared(programs: list[str], limits: Limits, threads: int | None, ranks: Ranks) -> dict[str, str]:
    """The outcome of each program; each runs on one rank."""
    # With too many at once their wall time ends before they have run.
    threads = threads or max(1, 2 * len(os.sched_getaffinity(0)) // ranks.world)
    parts = [programs[start : start + _PROGRAMS] for start in range(0, len(programs), _PROGRAMS)]
    outcomes = ranks.map(
        "programs", parts, lambda part: [_outcome(r) for r in run_many(part, limits, threads)]
    )
    return dict(zip(programs, (outcome for part in outcomes for outcome in part), strict=True))


def _outcome(result: ProgramResult) -> str:
    last = result.tail.rstrip().rpartition("\n")[2]
    return "no code" if result.outcome == "failed" and last.startswith(_NO_CODE) else result.outcome


def _runner(suite: str, make: Callable[[Row], Problem], about: dict[str, str]) -> Run:
    def run(subject: "ModelUnderTest", rows: list[Row], config: SuiteConfig) -> Outcome:
        """Sample `samples` answers to each problem and test them.

        Raises:
            RecipeError: running code is not allowed.
            StageFailed: the sandbox does not work on this machine.
        """
        check(config)
        problems = [make(row) for row in sample_rows(rows, config.limit, config.seed)]
        chat = wants_chat(subject, config)
        prompts = [_prompt(problem, chat) for problem in problems for _ in range(config.samples)]
        drawn = subject.answers(prompts, config.sampling, seed=config.seed)
        answers = [drawn[i : i + config.samples] for i in range(0, len(drawn), config.samples)]
        items, counts = score(problems, answers, chat=chat, ranks=subject.ranks)
        room = subject.tokens.max_length - config.sampling.max_new_tokens
        cut = sum(len(subject.tokenise.prompt(*prompt)) > room for prompt in prompts[:: config.samples])
        return Outcome(
            items=items,
            specs=[MeasureSpec(name=f"pass@{k}", label=f"pass@{k}") for k in KS if k <= config.samples],
            facts={"answers": dict(counts), "prompts cut from the left": cut},
            settings={
                "prompt": about["chat" if chat else "completion"],
                "shots": 0,
                "samples": config.samples,
                "sampling": config.sampling.model_dump(),
                "seed": config.seed,
                "limits": LIMITS.model_dump(),
                "beside lm-evaluation-harness": about["harness"],
            },
        )

    return run


def check(config: SuiteConfig) -> None:
    """Check that running code is allowed and that the sandbox works.

    Raises:
        RecipeError: running code is not allowed.
        StageFailed: the sandbox does not work on this machine.
    """
    if not config.run_code:
        raise RecipeError(
            "the suite runs code that the model writes, which is not allowed",
            "Pass --run-code (in a recipe suites.settings.run_code: true) to run it in a sandbox without "
            "network and files, or remove humaneval and mbpp",
        )
    check_sandbox()


def _prompt(problem: Problem, chat: bool) -> Prompt:
    return as_prompt(problem.instruction if chat else problem.text, chat=chat)


def _reader(fields: dict[str, type]) -> Callable[[Path], list[Row]]:
    def read(path: Path) -> list[Row]:
        """All rows of the file, each with the fields of the suite.

        Raises:
            DataError: the file cannot be read, or a row lacks a field.
        """
        rows = [row for _, chunk in read_rows(str(path)) for row in chunk]
        for number, row in enumerate(rows, 1):
            for name, kind in fields.items():
                if not isinstance(row.get(name), kind):
                    raise DataError(
                        f"row {number} of {path} has no {name} ({kind.__name__})",
                        f"Each row needs {', '.join(fields)}",
                    )
        return rows

    return read


_HUMANEVAL = {
    "completion": "the function's head as it is, completed; cut at " + " ".join(map(repr, STOPS)),
    "chat": "a user's turn that asks for the whole function in a fenced block",
    "harness": "completion: the prompt and stops of its humaneval 1.0, which is greedy; chat: its "
    "humaneval_instruct begins the answer with the head of the function, here the model begins it. Its "
    "metric code_eval needs the hub, and runs programs without isolation",
}
_MBPP = {
    "completion": "the paper's prompt with all tests, without examples, from [BEGIN]; cut at [DONE]",
    "chat": "the paper's words with all tests as a user's turn that asks for a fenced block",
    "harness": "its mbpp has the 500 test tasks as first written, 3 tests shown and 3 examples; here the 427 "
    "revised tasks of all parts (the subset `test` has those of its split), all tests shown, no examples",
}
SUITES = [
    Suite(
        name="humaneval",
        title="HumanEval",
        about="164 Python functions to complete, judged by their tests (needs --run-code)",
        files=("HumanEval.jsonl.gz", "HumanEval.jsonl"),
        source="https://github.com/openai/human-eval, data/HumanEval.jsonl.gz",
        check=check,
        run=_runner("humaneval", humaneval_problem, _HUMANEVAL),
        read=_reader(dict.fromkeys(("task_id", "prompt", "entry_point", "canonical_solution", "test"), str)),
    ),
    Suite(
        name="mbpp",
        title="MBPP",
        about="427 short Python tasks, judged by their tests (needs --run-code)",
        files=("mbpp_sanitized.json.gz", "sanitized-mbpp.json", "sanitized-mbpp.json.gz"),
        source="https://github.com/google-research/google-research/tree/master/mbpp, sanitized-mbpp.json",
        check=check,
        run=_runner("mbpp", mbpp_problem, _MBPP),
        read=_reader({"task_id": int, "prompt": str, "code": str, "test_imports": list, "test_list": list}),
    ),
]
