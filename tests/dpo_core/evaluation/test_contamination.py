"""Contamination: matches and non-matches of evaluation prompts, real data, and a large table."""

import time
from pathlib import Path

import numpy as np
import pytest

from dpo_core.data.config import DataConfig
from dpo_core.data.layouts.fields import PairFields, PromptFields, Unpaired
from dpo_core.data.load import load
from dpo_core.data.records import to_frame
from dpo_core.evaluation.contamination import TEMPLATE, TrainingText, training_texts
from dpo_core.evaluation.results import Item

SEA = "Why is the water of the sea so salty although the rivers that feed it carry none that we taste?"


def item(name: str, prompt: str) -> Item:
    return Item(id=name, cluster=name, prompt=prompt, values={})


def found(texts: list[str], prompt: str) -> str | None:
    return TrainingText(texts).find([item("one", prompt)]).get("one")


def test_a_whole_prompt_is_found_whatever_its_case_marks_and_spaces() -> None:
    assert found(["What is  a FJORD"], "“What is a fjord?”") == "exact"
    assert found(["ﬁnd Ａ word"], "Find a word!") == "exact", "compatible forms"
    assert found(["What is a fjord in Norway?"], "What is a fjord?") is None, (
        "a short prompt is found whole only"
    )
    assert found([SEA], SEA.lower()) == "exact"


def test_thirteen_words_in_a_row_are_enough_and_twelve_are_not() -> None:
    words = SEA.split()
    assert len(words) > 15
    assert found([f"Tell me: {' '.join(words[2:15])} and more"], SEA) == "13-gram"
    assert found([f"Tell me: {' '.join(words[2:14])} and more"], SEA) is None
    assert found([" ".join(words[:8]), " ".join(words[8:])], SEA) is None, "nothing spans two texts"
    assert found([" ".join(words[:13])], " ".join(words[:13])) == "exact"
    assert found([" ".join(reversed(words))], SEA) is None, "the order counts"


def test_answers_and_prompts_of_a_conversation_are_searched_one_by_one() -> None:
    chat = '[{"role":"user","content":"What is\\na fjord?"},{"role":"assistant","content":"A long bay."}]'
    frame = to_frame([PairFields(chat, True, SEA, "It is not."), PairFields("", False, "", "")])
    texts = TrainingText(training_texts(frame))
    items = [item("turn", "What is a fjord?"), item("answer", SEA), item("json", "role user content What is")]
    assert texts.find(items) == {"turn": "exact", "answer": "exact"}
    assert list(training_texts(to_frame([Unpaired("p", False, "c", True)], "unpaired"))) == ["p", "c"]
    assert list(training_texts(to_frame([PromptFields("p", False)], "prompts"))) == ["p"]


def test_a_transcript_is_taken_turn_by_turn() -> None:
    transcript = "\n\nHuman: What is a fjord?\n\nAssistant: A bay.\n\nHuman: And a loch?\n\nAssistant:"
    assert found([transcript], "And a loch?") == "exact"
    assert found([transcript], "Human: And a loch?") is None


def test_the_wording_that_a_suite_puts_around_every_prompt_does_not_count() -> None:
    """Neither a preamble, which is not in `prompt`, nor instructions that many prompts begin with."""
    wording = "Answer the following question with a single word and give no reason for it at all please:"
    texts = TrainingText([wording + " How high is the tower?"])
    many = [item(str(i), f"{wording} Question {i}?") for i in range(TEMPLATE + 1)]
    assert texts.find(many) == {}
    assert len(texts.find(many[:TEMPLATE])) == TEMPLATE, "words that a few share may be a question's own"
    # Samples of one prompt are one prompt, however many there are.
    samples = [item(str(i), SEA) for i in range(2 * TEMPLATE)]
    assert len(TrainingText(["So: " + SEA]).find(samples)) == 2 * TEMPLATE


def test_nothing_to_find() -> None:
    assert TrainingText([]).find([item("one", SEA), item("none", "")]) == {}
    assert found(["", "?!"], "?!") is None, "a prompt without words is no prompt"
    assert TrainingText([SEA]).find([]) == {}


def test_two_prompts_of_xstest_stand_in_hh_harmless(shared: Path) -> None:
    train = load(DataConfig(path=str(shared / "data/preference/hh_harmless_base_test.jsonl.gz"))).frame
    prompts = load(DataConfig(path=str(shared / "data/safety/xstest_prompts.csv"))).frame
    items = [item(str(row), prompt) for row, prompt in zip(prompts["row"], prompts["prompt"], strict=True)]
    assert TrainingText(training_texts(train)).find(items) == {"182": "exact", "222": "exact"}


def test_a_file_is_contaminated_by_itself(shared: Path) -> None:
    frame = load(DataConfig(path=str(shared / "data/preference/hhh_alignment.jsonl.gz"))).frame
    prompts = frame["prompt"].unique()
    items = [item(str(i), prompt) for i, prompt in enumerate(prompts)]
    assert TrainingText(training_texts(frame)).find(items) == {item.id: "exact" for item in items}
    quoted = TrainingText(f"As they said: {prompt} Is that so?" for prompt in prompts)
    long = {item.id for item in items if len(item.prompt.split()) > 20}
    assert len(long) > 20
    assert long <= set(quoted.find(items))


def test_thousands_of_rows_take_a_second_and_eight_bytes_a_gram() -> None:
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"word{i}" for i in range(5000)])
    rows, words = 20_000, 24
    texts = [" ".join(row) for row in vocabulary[rng.integers(0, 5000, (rows, words))]]
    start = time.process_time()
    index = TrainingText(texts)
    took = time.process_time() - start
    assert index._grams.nbytes == 8 * rows * (words - 12), "none spans two rows, none is equal, none is lost"
    assert took < 4
    items = [item(str(i), f"Say {text[20:]} now") for i, text in enumerate(texts[::200])]
    assert index.find(items) == dict.fromkeys((item.id for item in items), "13-gram")


@pytest.mark.parametrize("block", [1, 13, 50])
def test_blocks_make_no_difference(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{SEA} {i}" for i in range(9)]
    index = TrainingText(texts)
    monkeypatch.setattr("dpo_core.evaluation.contamination._BLOCK", block)
    assert TrainingText(texts)._grams.nbytes == index._grams.nbytes > 0
