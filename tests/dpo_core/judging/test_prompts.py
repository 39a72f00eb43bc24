"""Prompts for a judge, and parsing of the letter in its reply."""

import json

import pytest

from dpo_core.errors import RecipeError
from dpo_core.judging.prompts import TEMPLATES, find_template, readable, verdict


@pytest.mark.parametrize("name", ["summary", "summary_strict", "dialogue", "harmless", "instruction"])
def test_a_prompt_shows_both_answers_in_order_and_asks_for_a_sentence_then_a_letter(name: str) -> None:
    template = find_template(name)
    [message] = template.messages("What is {this}?", "the %s first", "the second\n")
    assert message["role"] == "user"
    text = message["content"]
    places = [text.index(part) for part in ("What is {this}?", " A]\nthe %s first\n", " B]\nthe second\n")]
    assert places == sorted(places)
    last = text.splitlines()[-2:]
    assert last == ["Comparison: <one sentence>", f"{template.label}: <A or B>"]
    assert verdict(text) is None, "the form itself is no verdict"
    assert verdict(f"Comparison: they differ.\n{template.label}: B") == "B"


def test_the_strict_summary_asks_for_more_than_the_other() -> None:
    plain, strict = TEMPLATES["summary"].opening, TEMPLATES["summary_strict"].opening
    assert strict.startswith(plain.removesuffix("."))
    assert "details without importance" in strict
    assert len({template.identity for template in TEMPLATES.values()}) == len(TEMPLATES)


def test_an_unknown_prompt_is_refused_with_those_there_are() -> None:
    with pytest.raises(RecipeError, match="no judge prompt 'poem'") as caught:
        find_template("poem")
    assert "summary, summary_strict, dialogue" in caught.value.remedy


def test_a_conversation_is_shown_turn_by_turn() -> None:
    turns = [{"role": "user", "content": "Hi [1]"}, {"role": "assistant", "content": "Hello"}]
    assert readable(json.dumps(turns)) == "User: Hi [1]\n\nAssistant: Hello"
    for text in ("Hi", "[1] is a number", '["a", "b"]', '[{"role": 1, "content": 2}]', "[", ""):
        assert readable(text) == text


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Comparison: A is vague, B is not.\nPreferred: B", "B"),
        ("Comparison: A is vague, B is not.\nPreferred: A", "A"),
        ("preferred: b", "B"),
        ("PREFERRED: a.", "A"),
        ("**Comparison:** one misses the point.\n\n**More helpful:** **A**", "A"),
        ("**Preferred: B**", "B"),
        ("- Preferred: `B`", "B"),
        ("### Preferred:\nB", "B"),
        ('Preferred: "A"', "A"),
        ("Preferred: (B)", "B"),
        ("Preferred: [A]", "A"),
        ("Preferred: <B>", "B"),
        (r"Preferred: $\boxed{A}$", "A"),
        ("Preferred: Summary B", "B"),
        ("Preferred summary: A", "A"),
        ("My final answer: response a", "A"),
        ("Preferred: B is better overall, it is shorter", "B"),
        ("Preferred: A is the clearer one", "A"),
        ("Preferred: A, which covers more", "A"),
        ("Preferred: A (it covers more)", "A"),
        ("Preferred: A's account is fuller", "A"),
        ("Comparison: the first is dull. Preferred: B", "B"),
        ("Safer: A\n\nI hope this helps!", "A"),
        ("Better:   B   ", "B"),
        ("Preferred：Ｂ", "B"),
        ("Comparison: A wins.\nB", "B"),
        ("Reply A.", "A"),
        ("Comparison: <one sentence>\nPreferred: <A or B>\nComparison: x\nPreferred: A", "A"),
        ("<think>Preferred: A? No.</think>\nPreferred: B", "B"),
        ("Preferred: B\r\n", "B"),
        # No choice, or none that can be read.
        ("", None),
        ("\n \n", None),
        ("Preferred:", None),
        ("Preferred: A or B", None),
        ("Preferred: A/B", None),
        ("Preferred: A, B", None),
        ("Preferred: A is better than B", None),
        ("Preferred: both", None),
        ("Preferred: Neither A", None),
        ("Preferred: A tie.", None),
        ("Preferred: A mix of the two", None),
        ("Preferred: a bit of each", None),
        ("Preferred: C", None),
        ("Preferred: Vitamin B12", None),
        ("Preferred: Bananas", None),
        ("Preferred: A\nPreferred: B", None),
        ("Preferred: A\nPreferred: I cannot say", None),
        ("Comparison: Reply A is more helpful.", None),
        ("I would take reply B here because it is kind", None),
        ("<think>Preferred: A", None),
        ("Once upon a time there was a girl named Lily.", None),
        ("A B A B A B", None),
    ],
)
def test_the_verdict_is_read_or_refused(text: str, letter: str | None) -> None:
    assert verdict(text) == letter
