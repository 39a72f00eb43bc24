"""Suites of lm-eval give the same numbers as lm-eval itself on the same data and model."""

import csv
import gzip
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_core.errors import DataError, ModelError, RecipeError, StageFailed
from dpo_core.evaluation.config import SuiteConfig
from dpo_core.evaluation.model_under_test import ModelUnderTest
from dpo_core.evaluation.results import Outcome
from dpo_core.evaluation.suites import gsm8k, truthfulqa
from dpo_core.evaluation.suites import lm_eval_tasks as harness
from dpo_core.evaluation.suites.registry import find
from dpo_core.evaluation.suites.rows import sample_rows
from dpo_core.generation.config import SamplingConfig
from dpo_core.ranks import SingleRank
from tests.support.models.tiny import make_tiny_model

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

SHORT = SamplingConfig(max_new_tokens=8)


def config(**changes: Any) -> SuiteConfig:
    return SuiteConfig(**({"precision": "fp32", "sampling": SHORT, "chat": "never"} | changes))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> ModelUnderTest:
    """A tiny model into whose context five shots fit, on a tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("wide")
    return ModelUnderTest(make_tiny_model(folder, taught=True, max_position_embeddings=4096), "wide")


@pytest.fixture(autouse=True)
def _no_survey_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's record of drivers and packages takes seconds in every run and changes no number."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def run(name: str, subject: ModelUnderTest, rows: list[dict], settings: SuiteConfig) -> Outcome:
    return find(name).run(subject, rows, settings)


def directly(
    subject: ModelUnderTest,
    family: str,
    data: dict[str, Path],
    names: list[str],
    *,
    chat: bool = False,
    **asked: Any,
) -> dict:
    """lm-eval's own entry point, class and loader on data files, as its users call it."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = Path(lm_eval.__file__).parent / "tasks" / family
    files = {split: str(path) for split, path in data.items()}
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    return lm_eval.simple_evaluate(
        HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=4),
        tasks=[{"group": "direct", "task": [{"task": name, **local} for name in names]}],
        task_manager=TaskManager(include_defaults=False, include_path=str(folder)),
        apply_chat_template=chat,
        bootstrap_iters=0,
        **asked,
    )


def json_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def truthful_rows(shared: Path, count: int) -> list[dict]:
    """Rows of the CSV in the shape of the hub's data set, converted here by hand."""
    path = shared / "data" / "eval" / "TruthfulQA.csv.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))[:count]
    rows = []
    for line in lines:
        true, false = line["Correct Answers"].split("; "), line["Incorrect Answers"].split("; ")
        one, two = [line["Best Answer"], *false], true + false
        rows.append(
            {
                "question": line["Question"],
                "best_answer": line["Best Answer"],
                "correct_answers": true,
                "incorrect_answers": false,
                "mc1_targets": {"choices": one, "labels": [1] + [0] * (len(one) - 1)},
                "mc2_targets": {"choices": two, "labels": [1] * len(true) + [0] * len(false)},
            }
        )
    return rows


def by_filter(results: dict, task: str, field: str, which: str = "none") -> list[float]:
    logged = sorted(results["samples"][task], key=lambda s: s["doc_id"])
    return [float(s[field]) for s in logged if s["filter"] == which]


@pytest.mark.parametrize("chat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_truthfulqa_by_likelihood_is_what_lm_eval_measures(
    chat: bool, wide: ModelUnderTest, shared: Path, tmp_path: Path
) -> None:
    rows = find("truthfulqa_mc").read(shared / "data" / "eval" / "TruthfulQA.csv.gz")
    assert len(rows) == 790
    file = json_lines(tmp_path / "mc.jsonl", truthful_rows(shared, 6))
    names = ["truthfulqa_mc1", "truthfulqa_mc2"]
    theirs = directly(wide, "truthfulqa", {"validation": file}, names, chat=chat)
    ours = run("truthfulqa_mc", wide, rows[:6], config(chat="always" if chat else "never"))
    assert ours.settings["chat_template"] is chat
    assert [i.values["mc1"] for i in ours.items] == by_filter(theirs, "truthfulqa_mc1", "acc")
    mc2 = by_filter(theirs, "truthfulqa_mc2", "acc")
    assert [i.values["mc2"] for i in ours.items] == pytest.approx(mc2, abs=1e-4)
    assert len(set(mc2)) == 6, "the numbers differ from question to question"
    assert ours.items[0].prompt == rows[0]["question"]
    assert ours.items[0].answer in rows[0]["mc1_targets"]["choices"]
    assert {i.subset for i in ours.items} <= {"Adversarial", "Non-Adversarial"}


def test_the_engine_gives_the_log_probs_of_lm_evals_class(stories: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from dpo_core.evaluation.lm_eval_model import HarnessLM

    subject = ModelUnderTest(stories, "stories")  # its tokenizer writes a begin token, its context is 512
    ours = HarnessLM(subject)
    theirs = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=4)
    start = "Once upon a time"
    pairs = [(start, end) for end in (" there was a girl.", " a dog", " cat and a very big red ball.")]
    pairs += [("", "Lily"), ("Tom ran. " * 200, "He saw a bird."), (start, " a dog")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    logps = [logp for logp, _ in ours.loglikelihood(requests)]
    expected = [logp for logp, _ in theirs.loglikelihood(requests, disable_tqdm=True)]
    assert logps == pytest.approx(expected, abs=1e-4)
    assert ours.cut == 1, "the long prompt was cut, and counted"


def test_a_model_that_scales_its_logits_is_asked_by_its_own_forward(wide: ModelUnderTest) -> None:
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import GraniteConfig, GraniteForCausalLM

    from dpo_core.evaluation.lm_eval_model import HarnessLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    scaled = ModelUnderTest(wide.path, "scaled")
    scaled.model = GraniteForCausalLM(
        GraniteConfig(**shape, num_key_value_heads=2, vocab_size=len(wide.tokenizer), logits_scaling=0.1)
    ).eval()
    requests = [Instance("loglikelihood", {}, ("The film", " was long"), 0)]
    theirs = HFLM(pretrained=scaled.model, tokenizer=scaled.tokenizer)
    [(expected, _)] = theirs.loglikelihood(requests, disable_tqdm=True)
    [(found, _)] = HarnessLM(scaled).loglikelihood(requests)
    assert found == pytest.approx(expected, abs=1e-4)


def test_mc2_survives_answers_whose_probability_is_nothing() -> None:
    from lm_eval.tasks.truthfulqa.utils import process_results_mc2

    doc = {"question": "?", "mc2_targets": {"labels": [1, 0, 0]}}
    near = [(-3.0, False), (-4.0, False), (-5.0, False)]
    assert truthfulqa.mc2(doc, near)["acc"] == pytest.approx(process_results_mc2(doc, near)["acc"], rel=1e-12)
    far = [(logp - 900, greedy) for logp, greedy in near]
    with np.errstate(invalid="ignore"):
        assert np.isnan(process_results_mc2(doc, far)["acc"]), "what would have been reported"
    assert truthfulqa.mc2(doc, far)["acc"] == pytest.approx(truthfulqa.mc2(doc, near)["acc"], rel=1e-9)
    with pytest.raises(StageFailed, match="log-prob nan"):
        truthfulqa.mc2(doc, [(-1.0, False), (float("nan"), False), (-2.0, False)])


def test_truthfulqa_answers_are_compared_as_lm_eval_compares_them(
    stories: Path, shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = find("truthfulqa_gen").read(shared / "data" / "eval" / "TruthfulQA.csv.gz")
    file = json_lines(tmp_path / "gen.jsonl", truthful_rows(shared, 2))
    subject = ModelUnderTest(
        stories, "stories"
    )  # it writes English, of which some words stand in the references
    theirs = directly(
        subject, "truthfulqa", {"validation": file}, ["truthfulqa_gen"], gen_kwargs={"max_gen_toks": 24}
    )
    capfd.readouterr()
    ours = run("truthfulqa_gen", subject, rows[:2], config(sampling=SamplingConfig(max_new_tokens=24)))
    assert capfd.readouterr() == ("", "")
    for name in ("bleu_acc", "bleu_max", "bleu_diff", "rouge1_acc", "rouge2_max", "rougeL_diff"):
        expected = by_filter(theirs, "truthfulqa_gen", name)
        assert [i.values[name] for i in ours.items] == pytest.approx(expected)
    assert max(i.values["rouge1_max"] for i in ours.items) > 0, "something of the answers is in a reference"
    assert {spec.name for spec in ours.specs} == set(ours.items[0].values)


def gsm8k_files(shared: Path, folder: Path, tests: int, shots: int) -> Path:
    """The first rows of both files, side by side; gives the file of test questions."""
    for name, count in (("gsm8k_test.jsonl", tests), ("gsm8k_train.jsonl", shots)):
        with gzip.open(shared / "data" / "eval" / f"{name}.gz", "rt", encoding="utf-8") as file:
            (folder / name).write_text("".join(file.readline() for _ in range(count)))
    return folder / "gsm8k_test.jsonl"


@pytest.mark.parametrize("chat", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gsm8k_is_what_lm_eval_measures(
    chat: bool, wide: ModelUnderTest, shared: Path, tmp_path: Path
) -> None:
    test = gsm8k_files(shared, tmp_path, 4, 40)
    data = {"test": test, "train": tmp_path / "gsm8k_train.jsonl"}
    theirs = directly(wide, "gsm8k", data, ["gsm8k"], chat=chat, gen_kwargs={"max_gen_toks": 8})
    ours = run("gsm8k", wide, find("gsm8k").read(test), config(chat="always" if chat else "never"))
    answers = {s["doc_id"]: s["resps"][0][0] for s in theirs["samples"]["gsm8k"]}
    assert [i.answer for i in ours.items] == [answers[i] for i in range(4)]
    assert any(answer.strip() for answer in answers.values())
    for measure, which in (("strict", "strict-match"), ("flexible", "flexible-extract")):
        assert [i.values[measure] for i in ours.items] == by_filter(theirs, "gsm8k", "exact_match", which)
    assert ours.settings["shots"] == 5
    assert ours.settings["tasks"] == {"gsm8k": 3.0}
    assert ours.settings["library"].startswith("lm-eval 0.4.")
    assert ours.facts["prompts_cut_to_the_context"] == 0


def written(answers: dict[str, str]) -> Any:
    """An lm-eval model whose answers were written by hand, by question; it keeps the prompts in `asked`."""
    from lm_eval.api.model import LM

    class Written(LM):
        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            self.asked = [request.args[0] for request in requests]
            return [answers[request.doc["question"]] for request in requests]

        loglikelihood = loglikelihood_rolling = generate_until

    return Written()


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        ("She has 3 * 6 = 18.\n#### 18", 1, 1),
        ("#### 18.", 1, 1),  # the full stop is dropped
        ("So it is 18.", 0, 1),
        ("So it is $18", 0, 1),
        ("#### 19", 0, 0),
        ("#### 18\nBut 7 are left", 1, 0),
        ("eighteen", 0, 0),
        ("", 0, 0),
        ("#### 18.0", 0, 0),  # compared as text
    ],
)
def test_exact_match(answer: str, strict: int, flexible: int) -> None:
    rows = [{"question": "How many?", "answer": "3 * 6 = 18\n#### 18"}]
    assert marks(rows, [answer]) == [(strict, flexible)]


def test_thousands_commas_do_not_matter() -> None:
    rows = [{"question": f"{i}?", "answer": f"#### {n}"} for i, n in enumerate(["1,450", "1450"])]
    assert marks(rows, ["#### 1450", "It costs $1,450."]) == [(1, 1), (0, 1)]


def marks(rows: list[dict], answers: list[str]) -> list[tuple[float, float]]:
    """Strict and flexible match of hand-written answers by the task that the suite loads."""
    tasks = harness.load_tasks("gsm8k", ["gsm8k"], {"test": rows, "train": SHOTS})
    lm = written({row["question"]: answer for row, answer in zip(rows, answers, strict=True)})
    samples = harness.evaluate_tasks(lm, tasks, chat=False)
    matches = [by_filter({"samples": samples}, "gsm8k", "exact_match", w) for w in FILTERS]
    return list(zip(*matches, strict=True))


FILTERS = ("strict-match", "flexible-extract")
SHOTS = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(8)]


def test_no_question_stands_among_its_own_shots(wide: ModelUnderTest, shared: Path, tmp_path: Path) -> None:
    test = gsm8k_files(shared, tmp_path, 3, 20)
    leaked = test.read_text()
    train = tmp_path / "gsm8k_train.jsonl"
    train.write_text(leaked + train.read_text())
    rows = find("gsm8k").read(test)
    pool, source = gsm8k.shots(rows)
    assert source["rows"] == len(pool) == 20, "the three leaked questions are left out"
    tasks = harness.load_tasks("gsm8k", ["gsm8k"], {"test": gsm8k.questions(rows), "train": pool})
    lm = written({row["question"]: "#### 1" for row in rows})
    harness.evaluate_tasks(lm, tasks, chat=False)
    for row, prompt in zip(rows, lm.asked, strict=True):
        assert prompt.endswith(f"Question: {row['question']}\nAnswer:")
        assert prompt.count("Question: ") == 6
        assert prompt.count("####") == 5
        assert not any(other["question"] in prompt for other in rows if other is not row)


def test_without_training_questions_the_shots_are_the_librarys_own(
    wide: ModelUnderTest, shared: Path, tmp_path: Path
) -> None:
    test = gsm8k_files(shared, tmp_path, 2, 1)
    (tmp_path / "gsm8k_train.jsonl").unlink()
    outcome = run("gsm8k", wide, find("gsm8k").read(test), config())
    assert outcome.settings["tasks"] == {"gsm8k_cot": 3.0}
    assert outcome.settings["shots"] == 8
    assert "fixed shots" in outcome.settings["shots_from"]
    assert len(outcome.items) == 2


def test_an_answer_that_does_not_fit_is_refused_and_a_cut_prompt_counted(
    stories: Path, shared: Path, tmp_path: Path
) -> None:
    rows = find("gsm8k").read(gsm8k_files(shared, tmp_path, 2, 10))
    narrow = ModelUnderTest(stories, "stories")  # a context of 512: five shots do not fit
    assert run("gsm8k", narrow, rows, config()).facts["prompts_cut_to_the_context"] == 2
    with pytest.raises(StageFailed, match="answers of up to 512 tokens do not fit into the context of 512"):
        run("gsm8k", narrow, rows, config(sampling=SamplingConfig(max_new_tokens=512)))
    with pytest.raises(ModelError, match="no chat template"):
        run("gsm8k", narrow, rows, config(chat="always"))


def test_nothing_is_printed_and_every_answer_counts_in_the_progress(
    wide: ModelUnderTest, shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[int] = []
    subject = ModelUnderTest(wide.path, "wide", ranks=SingleRank(told.append))
    rows = find("gsm8k").read(gsm8k_files(shared, tmp_path, 3, 10))
    run("gsm8k", subject, rows, config(limit=2, sampling=SHORT.model_copy(update={"batch_size": 1})))
    assert told == [1, 2]
    rows = find("truthfulqa_mc").read(shared / "data" / "eval" / "TruthfulQA.csv.gz")
    run("truthfulqa_mc", subject, rows, config(limit=1))
    assert capfd.readouterr() == ("", "")


def test_a_limit_chooses_the_same_rows_for_every_model() -> None:
    rows = [{"id": str(i)} for i in range(50)]
    chosen = [row["id"] for row in sample_rows(rows, 10, 3)]
    assert chosen == [row["id"] for row in sample_rows(rows, 10, 3)]
    assert len(set(chosen)) == 10
    assert chosen == sorted(chosen, key=int)
    assert chosen != [row["id"] for row in sample_rows(rows, 10, 4)]
    assert sample_rows(rows, None, 0) == sample_rows(rows, 50, 0) == rows


def test_without_lm_eval_the_message_says_how_to_get_it(
    wide: ModelUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.api.task", raising=False)
    with pytest.raises(RecipeError, match=r"pip install .*\.\[eval\]"):
        run("gsm8k", wide, [{"id": "0", "question": "?", "answer": "#### 1", "shots_from": ""}], config())


def test_a_file_of_another_shape_is_refused(tmp_path: Path) -> None:
    rows = [{"question": "How many?", "answer": "#### 4"}, {"question": "How few?", "answer": "four"}]
    with pytest.raises(DataError, match=r"row 2 .*'#### number'"):
        find("gsm8k").read(json_lines(tmp_path / "gsm8k_test.jsonl", rows))
    with pytest.raises(DataError, match=r"row 1 of .* has no text in the field 'Question'"):
        find("truthfulqa_mc").read(json_lines(tmp_path / "TruthfulQA.jsonl", rows))


def test_warnings_reach_the_log_although_the_library_is_quiet(caplog, capsys) -> None:
    with harness._quiet():
        print("noise", file=sys.stderr)
        warnings.warn("a cut prompt", stacklevel=1)
    assert "a cut prompt" in caplog.text
    assert capsys.readouterr().err == ""
