"""Images as tokens: exact lengths, codes alone, and the same log-probs in sampling and in training."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_core.data.config import DataConfig
from dpo_core.data.load import load
from dpo_core.data.tokens.chat_template import TemplateError
from dpo_core.data.tokens.config import TokenConfig
from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.errors import DpoError
from dpo_core.evaluation.config import SuiteConfig
from dpo_core.evaluation.model_under_test import ModelUnderTest
from dpo_core.evaluation.suites.registry import find
from dpo_core.generation.config import SamplingConfig
from dpo_core.generation.generate import sample
from dpo_core.generation.next_token import WholeRows, open_rows
from dpo_core.images.prompts import PROMPT_FILES, TAGS, records, words
from dpo_core.images.records import Thing, read_record
from dpo_core.images.rewards import SceneReward
from dpo_core.images.scenes import CELLS, box_at, codes, draw, encode
from dpo_core.models.load import load_model, load_tokenizer
from dpo_core.scoring.completion_scores import completion_scores

FOLDER = Path(__file__).parents[3] / "dpo_core" / "images" / "scenes_model"
TOKENS = TokenConfig(max_length=88, max_prompt_length=24)
SAMPLING = SamplingConfig(max_new_tokens=64, precision="fp32")


@pytest.fixture(scope="module")
def model(scenes_model: Path) -> torch.nn.Module:
    return load_model(scenes_model).requires_grad_(False)


@pytest.fixture(scope="module")
def tokenise(scenes_model: Path) -> Tokenise:
    return Tokenise(load_tokenizer(scenes_model), TOKENS)


def test_the_packaged_model_and_prompts_are_those_of_the_world() -> None:
    facts = {
        "count": codes(), "length": CELLS * CELLS, "codec": "scenes",
        "opening": codes() + 2, "padding": codes(), "words": 14,
    }  # fmt: skip
    assert json.loads((FOLDER / "config.json").read_text())["image_codes"] == facts
    assert json.loads((FOLDER / "tokenizer_config.json").read_text())["image_codes"] == facts
    vocabulary = json.loads((FOLDER / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocabulary, key=vocabulary.get) == [
        *(f"<{code}>" for code in range(codes())),
        "<pad>", "<start>", "<image>", "<end>", "<unknown>",
        *words(),
    ]  # fmt: skip
    for domain, file in PROMPT_FILES.items():
        asked = [read_record(line) for line in file.read_text().splitlines()]
        assert asked == records(domain, 24, 2026)
        assert {record.tag for record in asked} == set(TAGS[domain])


def test_generated_prompts_have_records_and_are_not_those_of_the_suites() -> None:
    frame = load(DataConfig(scenes=5)).frame
    told = [read_record(text) for text in frame["metadata"]]
    assert [record.prompt for record in told] == list(frame["prompt"])
    assert len(frame) == 5 * len(TAGS["comp"])
    asked = {read_record(line).prompt for line in PROMPT_FILES["comp"].read_text().splitlines()}
    assert not asked & set(frame["prompt"])


def test_an_image_is_exactly_its_codes(tokenise: Tokenise) -> None:
    image = encode(np.stack([draw([])]))[0].tolist()
    text = " ".join(map(str, image))
    row = {"id": "1", "prompt": "a photo of a ring", "chat": False, "completion": text, "ended": True}
    sequence = tokenise.single(row)
    assert isinstance(sequence, TokenSequence)
    assert sequence.completion == tuple(image)
    assert sequence.targets == 64
    assert tokenise.text(sequence.completion, sequence.prompt) == text
    short = Tokenise(tokenise.tokenizer, TokenConfig(max_length=66, max_prompt_length=24))
    assert short.single(row) == "image_does_not_fit"


@pytest.mark.parametrize(
    ("prompt", "image"),
    [
        ("a photo of a ring", "0 " * 63),
        ("a photo of a ring", "0 " * 65),
        ("a photo of a ring", "0 " * 63 + "121"),
        ("a photo of a ring", "0 " * 63 + "-1"),
        ("a photo of a ring", "a square"),
        ("a photo of a dog", "0 " * 64),
    ],
)
def test_what_is_no_image_or_not_known_is_refused(tokenise: Tokenise, prompt: str, image: str) -> None:
    row = {"id": "1", "prompt": prompt, "chat": False, "completion": image, "ended": True}
    assert tokenise.single(row) == "refused_by_template"
    assert tokenise.refusal(row)


def test_samples_are_whole_images_with_the_trainers_log_probs(
    model: torch.nn.Module, tokenise: Tokenise
) -> None:
    prompts = [tokenise.prompt(text, False) for text in ("a photo of a ring", "two red squares")] * 4
    drawn = sample(model, prompts, SAMPLING, eos_id=tokenise.stop_ids, seed=3)
    assert all(len(c.ids) == 64 and c.ended and max(c.ids) < codes() for c in drawn)
    sequences = [TokenSequence(p, c.ids) for p, c in zip(prompts, drawn, strict=True)]
    for completion, score in zip(drawn, completion_scores(model, sequences, "fp32", 2048), strict=True):
        np.testing.assert_allclose(score.logps, completion.logps, atol=1e-4)
    # Of the model's own distribution most is on words and other tokens, which an image cannot have.
    ids = torch.tensor([prompts[0]])
    words_share = torch.softmax(model(input_ids=ids).logits[0, -1].float(), -1)[codes() :].sum()
    assert words_share > 0.05
    assert float(torch.softmax(open_rows(model, prompts[:1]).logits()[0], -1).sum()) == pytest.approx(1)


def test_prompts_are_filled_up_so_that_words_are_equally_far_from_each_place(tokenise: Tokenise) -> None:
    images = tokenise.images
    asked = [tokenise.prompt(text, False) for text in ("", "a photo of a ring")]
    assert {len(prompt) for prompt in asked} == {images.words + 1}
    assert all(prompt[-1] == images.opening for prompt in asked)
    assert asked[0] == images.null_prompt(asked[1])
    assert tokenise.prompt("a photo of a ring", False, budget=images.words) == ()
    with pytest.raises(TemplateError, match="made for 14"):
        tokenise.prompt("a photo of a ring " * 3, False)


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_guided_samples_have_the_guided_log_probs(
    model: torch.nn.Module, tokenise: Tokenise, guidance: float
) -> None:
    prompt = tokenise.prompt("a photo of a ring", False)
    nothing = tokenise.prompt("", False)
    config = SAMPLING.model_copy(update={"guidance": guidance})
    (drawn,) = sample(model, [prompt], config, eos_id=tokenise.stop_ids, seed=1)
    for place in (0, 1, 30, 63):
        so_far = drawn.ids[:place]
        given, without = (WholeRows(model, [start + so_far]).logits()[0] for start in (prompt, nothing))
        logps = torch.log_softmax(without + guidance * (given - without), -1)
        assert float(logps[drawn.ids[place]]) == pytest.approx(drawn.logps[place], abs=1e-4)


def test_settings_that_are_not_those_of_images_are_refused(
    model: torch.nn.Module, tokenise: Tokenise
) -> None:
    prompt = tokenise.prompt("a photo of a ring", False)
    with pytest.raises(DpoError, match="an image of this model has 64 tokens"):
        sample(model, [prompt], SamplingConfig(max_new_tokens=63), eos_id=0, seed=0)


def test_rewards_see_what_their_names_say() -> None:
    record = next(r for r in records("comp", 1, 0) if r.tag == "spatial")
    second, first = (w.name for w in record.include)
    relation = record.include[1].position[0]  # type: ignore[index]
    corners = {"left of": ((0, 4), (10, 4)), "above": ((4, 0), (4, 10))}
    swap = relation in ("right of", "below")
    one, two = corners["left of" if relation in ("left of", "right of") else "above"]
    places = (two, one) if swap else (one, two)
    right = [Thing(n, "red", "solid", box_at(*p)) for n, p in zip((first, second), places, strict=True)]
    wrong = [Thing(n, "red", "solid", box_at(*p)) for n, p in zip((second, first), places, strict=True)]
    images = [" ".join(map(str, c)) for c in encode(np.stack([draw(right), draw(wrong), draw(right[:1])]))]
    values = {
        kind: SceneReward(kind)([record.prompt] * 3, images, [record.to_json()] * 3)  # type: ignore[arg-type]
        for kind in ("exact", "binary", "words")
    }
    assert values == {"exact": [1, 2 / 3, 1 / 3], "binary": [1, 0, 0], "words": [1, 1, 1 / 2]}


def test_the_suites_score_is_the_mean_of_the_categories(scenes_model: Path) -> None:
    suite = find("scenes_gen")
    assert suite.packaged is not None
    config = SuiteConfig(sampling=SAMPLING, limit=30, precision="fp32")
    subject = ModelUnderTest(scenes_model, "tiny", TOKENS)
    outcome = suite.run(subject, suite.read(suite.packaged), config)
    tags: dict[str, list[float]] = {}
    for item in outcome.items:
        tags.setdefault(item.subset, []).append(item.values["score"])
    counts = {tag: len(values) for tag, values in tags.items()}
    scale = len(outcome.items) / len(counts)
    for item in outcome.items:
        assert item.values["score"] == pytest.approx(item.values["correct"] * scale / counts[item.subset])
