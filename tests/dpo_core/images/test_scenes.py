"""The detector finds what was drawn, and coding an image loses nothing."""

import random

import numpy as np
import pytest

from dpo_core.images import prompts, scenes
from dpo_core.images.records import Thing, requirements
from dpo_core.images.scenes import clutter, codes_of, decode, detect, draw, encode


@pytest.fixture(scope="module")
def drawn() -> list[list[Thing]]:
    return [things for _, things in prompts.captioned_scenes(1000, seed=3, wrong=0.0)]


def _set(things: list[Thing]) -> set[tuple]:
    return {(t.name, t.color, t.texture, t.box) for t in things}


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_every_object_of_a_thousand_scenes_is_found_and_nothing_else(drawn, noise):
    images = np.stack([draw(things) for things in drawn])
    shaken = images + np.random.default_rng(0).normal(0, noise * 255, images.shape)
    found = detect(np.clip(shaken, 0, 255).astype(np.uint8))
    assert [_set(things) for things in found] == [_set(things) for things in drawn]


def test_codes_hold_the_image(drawn):
    images = np.stack([draw(things) for things in drawn])
    codes = encode(images)
    assert codes.shape == (1000, 64)
    assert codes.max() < scenes.codes()
    assert (decode(codes) == images).all()
    assert (np.stack([codes_of(things) for things in drawn]) == codes).all()


def test_an_object_with_a_wrong_cell_does_not_count_and_is_clutter(drawn):
    image = draw([Thing("ring", "red", "solid", scenes.box_at(2, 4))])
    image[4:6, 4:6] = 0
    things = detect(image[None])[0]
    assert things == []
    assert clutter(image, things) == 1.0


def test_scenes_fulfil_their_records_unless_the_caption_is_wrong():
    share = {}
    for wrong in (0.0, 0.35):
        rows = list(prompts.captioned_scenes(2000, seed=1, wrong=wrong))
        share[wrong] = np.mean([all(r.holds for r in requirements(*row)) for row in rows])
    assert share[0.0] == 1.0
    assert 0.61 < share[0.35] < 0.69


def test_prompts_differ_and_speak_in_known_words():
    known = set(prompts.words())
    for domain, tags in prompts.TAGS.items():
        made = prompts.records(domain, 40, seed=0)
        assert len({record.prompt for record in made}) == len(made)
        assert {record.tag for record in made} == set(tags)
        assert all(set(record.prompt.split()) <= known for record in made)
        assert made == [*prompts.records(domain, 40, seed=0)]


def test_held_out_content_is_not_in_the_prompts():
    text = " ".join(
        record.prompt
        for domain in prompts.TAGS
        for record in prompts.records(domain, 60, 0, prompts.HELD_OUT)
    )
    assert not {"ring", "rings", "purple", "four"} & set(text.split())


def test_every_record_can_be_drawn():
    rng = random.Random(0)
    for domain in prompts.TAGS:
        for record in prompts.records(domain, 30, seed=5):
            image = draw(prompts.scene(record, rng))
            assert all(r.holds for r in requirements(record, detect(image[None])[0])), record.prompt
