"""The mismatched pairs of KTO's z_0: which prompt gets the completion of which example."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.errors import DataError
from dpo_core.examples.unpaired import UnpairedExample, _next_other, mismatched


def example(prompt: int, completion: int, desirable: bool = True) -> UnpairedExample:
    ids = TokenSequence((prompt, prompt), (completion,) * 3)
    return UnpairedExample(f"{prompt}-{completion}-{desirable}", ids, desirable)


def test_every_prompt_gets_another_examples_answer() -> None:
    examples = [example(i // 3, 100 + i) for i in range(60)]
    known = {e.sequence for e in examples}
    mismatches = mismatched(examples)
    assert [s.prompt for s in mismatches] == [e.sequence.prompt for e in examples]
    assert not known & set(mismatches)
    assert all(s.completion != e.sequence.completion for s, e in zip(mismatches, examples, strict=True))
    # A rotation: nearly every answer is given once, so that the mean is over the data's own answers.
    assert max(np.unique([s.completion[0] for s in mismatches], return_counts=True)[1]) <= 2


def test_partners_do_not_depend_on_order_or_label_and_little_on_one_more_row() -> None:
    examples = [example(i, 100 + i) for i in range(40)]
    mismatches = dict(zip([e.sequence for e in examples], mismatched(examples), strict=True))
    turned = [example(i, 100 + i, desirable=i % 2 > 0) for i in reversed(range(40))]
    assert dict(zip([e.sequence for e in turned], mismatched(turned), strict=True)) == mismatches
    more = [*examples, example(77, 177)]
    again = dict(zip([e.sequence for e in more], mismatched(more), strict=True))
    assert sum(again[key] != mismatches[key] for key in mismatches) == 1


@pytest.mark.parametrize(
    ("pairs", "wanted"),
    [
        ([(1, 5), (1, 6), (1, 7)], "another completion"),
        ([(1, 5), (2, 5), (3, 5)], "another prompt"),
        ([(1, 5), (1, 6), (2, 5)], "another completion"),
        ([(1, 5)] * 3 + [(2, 6)], "both"),
    ],
)
def test_where_prompts_or_answers_repeat_the_most_different_partner_is_taken(pairs, wanted) -> None:
    examples = [example(*pair) for pair in pairs]
    own, mismatches = examples[0].sequence, mismatched(examples)[0]
    assert mismatches.prompt == own.prompt
    assert (mismatches.completion != own.completion) is (wanted != "another prompt")
    if wanted == "both":
        assert mismatches.completion == (6, 6, 6)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=24))
def test_partners_are_those_of_a_plain_search(pairs: list[tuple[int, int]]) -> None:
    def next_place(place: int) -> int:
        """The first that differs in both; failing that, in the completion; failing that, in the prompt."""
        around = [(place + step) % len(pairs) for step in range(1, len(pairs))]
        differing = [[a != b for a, b in zip(pairs[place], pairs[other], strict=True)] for other in around]
        for wanted in ([True, True], [False, True], [True, False]):
            for other, differs in zip(around, differing, strict=True):
                if all(d or not w for d, w in zip(differs, wanted, strict=True)):
                    return other
        return -1

    prompts, completions = (np.array(codes) for codes in zip(*pairs, strict=True))
    assert _next_other(prompts, completions).tolist() == [next_place(i) for i in range(len(pairs))]


def test_the_search_skips_equal_examples() -> None:
    """A walk step by step would take the square of their number: minutes here."""
    codes = np.zeros(200_000, np.int64)
    codes[777] = 1
    begun = time.process_time()
    assert set(_next_other(codes, codes).tolist()) == {777, 778}
    assert time.process_time() - begun < 20


def test_mismatched_pairs_are_no_longer_than_the_longest_example() -> None:
    short, long = TokenSequence(tuple(range(9)), (1, 2)), TokenSequence((1,), tuple(range(10)))
    mismatches = mismatched([UnpairedExample("a", short, True), UnpairedExample("b", long, False)])
    assert [len(s) for s in mismatches] == [11, 3]
    assert mismatches[0].completion == (0, 1)
    assert mismatches[0].truncated


@pytest.mark.parametrize("examples", [[], [example(1, 2)], [example(1, 2), example(1, 2, False)]])
def test_fewer_than_two_different_examples_are_refused(examples) -> None:
    with pytest.raises(DataError, match="no two different training examples"):
        mismatched(examples)
