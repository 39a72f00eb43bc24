"""Generated openings and demonstrations: varied, neutral or balanced, and grammatical."""

import re
from collections import Counter

import pytest
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from dpo_core.data.demo.reviews import (
    SENTIMENTS,
    all_openings,
    demonstrations_with_sentiment,
    grammar,
    openings_for,
    review_demonstrations,
    review_openings,
)
from dpo_core.errors import RecipeError

PROMPTS = len(openings_for(demonstrations=False))


@pytest.fixture(scope="module")
def compound():
    analyzer = SentimentIntensityAnalyzer()
    return lambda text: analyzer.polarity_scores(text)["compound"]


def test_openings_are_many_short_and_distinct() -> None:
    texts = review_openings(600, 0)
    assert len(set(texts)) == 600
    assert PROMPTS >= 600
    for opening in all_openings():
        assert 4 <= len(opening.text.split()) <= 10, opening.text
        assert opening.text == opening.text.strip()
        assert opening.text[0].isupper()
        assert "{" not in opening.text
        assert "  " not in opening.text


def test_openings_say_nothing_good_or_bad(compound) -> None:
    assert [opening.text for opening in all_openings() if compound(opening.text) != 0] == []


def test_a_few_openings_are_of_every_kind() -> None:
    kinds = {opening.text: opening.kind for opening in all_openings()}
    assert Counter(kinds[text] for text in review_openings(24, 5)) == dict.fromkeys(grammar()["nouns"], 3)


def test_openings_depend_on_the_seed_alone() -> None:
    assert review_openings(50, 1) == review_openings(50, 1)
    assert review_openings(50, 1) != review_openings(50, 2)
    assert review_openings(80, 1)[:50] == review_openings(50, 1)


@pytest.mark.parametrize("n", [0, PROMPTS + 1])
def test_too_many_openings_are_refused_with_the_number_there_is(n: int) -> None:
    with pytest.raises(RecipeError, match=f"the grammar has {PROMPTS}"):
        review_openings(n, 0)


def test_demonstrations_never_use_an_opening_of_the_prompts() -> None:
    prompts = set(review_openings(PROMPTS, 0))
    taught = {opening for opening, _ in review_demonstrations(3000, 0)}
    assert len(taught) > 400
    assert not prompts & taught


def test_demonstrations_are_distinct_and_of_plain_length() -> None:
    pairs = review_demonstrations(3000, 0)
    assert len(set(pairs)) == 3000
    assert len({text for _, text in pairs}) > 2000
    for opening, text in pairs:
        assert text[0] == " "
        assert text[1] != " "
        assert 15 <= len(text.split()) <= 35, text
        assert 1 <= len(re.findall(r"[.!?](?: |$)", text)) <= 2, text
        assert text.endswith(".")
        assert not set("[]{}|") & set(opening + text)
    assert pairs == review_demonstrations(3000, 0)
    assert pairs != review_demonstrations(3000, 1)


def test_demonstrations_are_balanced_by_an_independent_scorer(compound) -> None:
    made = demonstrations_with_sentiment(1500, 0)
    assert Counter(sentiment for *_, sentiment in made) == dict.fromkeys(SENTIMENTS, 500)
    scores = {name: [compound(text) for _, text, wanted in made if wanted == name] for name in SENTIMENTS}
    assert min(scores["positive"]) > 0.3
    assert max(scores["negative"]) < 0
    assert sum(score < -0.3 for score in scores["negative"]) > 0.97 * 500
    every = [score for listed in scores.values() for score in listed]
    assert abs(sum(every) / len(every)) < 0.15
    assert abs(sum(scores["mixed"]) / 500) < 0.3


def test_agreement_of_number_and_article() -> None:
    plural = {opening.text: opening.plural for opening in all_openings()}
    seen = Counter()
    for opening, text in review_demonstrations(3000, 0):
        whole = opening + text
        assert not re.search(r"\ba (?=[aeio])(?!one)", whole), whole
        assert not re.search(r"\ban (?=[^aeiou])(?!hour|honest)", whole), whole
        assert not re.search(r"\b(\w+) \1\b", whole), whole
        first = text.split(".")[0]
        if plural[opening]:
            assert not re.match(r" (it|was)\b", first), whole
            seen["plural"] += bool(re.match(r" (they|were)\b", first))
        else:
            assert not re.match(r" (they|were)\b", first), whole
            seen["singular"] += bool(re.match(r" (it|was)\b", first))
        # A clause with its own subject follows a comma or "and"; a verb follows a noun.
        has_subject = re.match(r" (it|they) ", text) is not None
        ends_open = opening.endswith((",", " and")) and not opening.endswith("arrived on Monday and")
        assert has_subject == ends_open, whole
    assert min(seen["plural"], seen["singular"]) > 50
