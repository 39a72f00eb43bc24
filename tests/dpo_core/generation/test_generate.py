"""Sampling: the model's own distribution, reproducible with any batch size."""

import random
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpo_core.generation.config import SamplingConfig, seed_for
from dpo_core.generation.generate import Completion, sample
from dpo_core.models.load import load_model
from dpo_core.ranks import SingleRank
from tests.support.models.tiny import make_tiny_model

VOCABULARY, EOS = 5, 4
# Upper 0.1 % point of chi-square with 20 degrees of freedom: 4 x 5 two-token answers and the one-token end.
CRITICAL_20 = 45.31


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Five tokens, and weights large enough that their probabilities differ much."""
    folder = tmp_path_factory.mktemp("small")
    make_tiny_model(
        folder, seed=1, vocab_size=VOCABULARY, initializer_range=0.4, eos_token_id=EOS, pad_token_id=EOS
    )
    return load_model(folder)


def fp32(**changes: Any) -> SamplingConfig:
    return SamplingConfig(**({"precision": "fp32", "max_new_tokens": 12} | changes))


def exact(model: Any, prompt: tuple[int, ...], temperature: float) -> dict[tuple[int, ...], float]:
    """Probability of every answer of at most two tokens, from full softmaxes."""

    def next_token(ids: tuple[int, ...]) -> list[float]:
        with torch.no_grad():
            logits_V = model(torch.tensor([ids])).logits[0, -1]
        return torch.softmax(logits_V.double() / temperature, -1).tolist()

    first = next_token(prompt)
    answers = {(EOS,): first[EOS]}
    for a, b in product(range(VOCABULARY - 1), range(VOCABULARY)):
        answers[a, b] = first[a] * next_token((*prompt, a))[b]
    return answers


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_samples_follow_the_exact_distribution(small: Any, temperature: float) -> None:
    prompts = [(0, 3, 1, 1, 2, 0, 0), (2,)]  # one batch: the short prompt is padded by six
    each = 3000
    drawn = sample(
        small,
        [p for p in prompts for _ in range(each)],
        fp32(max_new_tokens=2, temperature=temperature, batch_size=2000),
        eos_id=EOS,
        seed=11,
    )
    for number, prompt in enumerate(prompts):
        wanted = exact(small, prompt, temperature)
        assert sum(wanted.values()) == pytest.approx(1)
        counts = Counter(c.ids for c in drawn[number * each : (number + 1) * each])
        assert set(counts) <= set(wanted)
        statistic = sum((counts[a] - each * p) ** 2 / (each * p) for a, p in wanted.items())
        assert statistic < CRITICAL_20
        # The test can tell this temperature from another.
        other = exact(small, prompt, 2.7 - temperature)
        assert sum((counts[a] - each * p) ** 2 / (each * p) for a, p in other.items()) > CRITICAL_20


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    draw = random.Random(4)
    return [tuple(draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 15))) for _ in range(24)]


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_the_batch_size_decides_nothing(small: Any, prompts: list[tuple[int, ...]], batch_size: int) -> None:
    """At size 1 nothing is padded: left padding and leaving rows change no sample either."""
    together = sample(small, prompts, fp32(batch_size=64), eos_id=EOS, seed=2)
    assert sample(small, prompts, fp32(batch_size=batch_size), eos_id=EOS, seed=2) == together
    assert {c.ended for c in together} == {True, False}


def test_padding_does_not_move_learnt_positions(prompts: list[tuple[int, ...]]) -> None:
    """Rotary positions are relative and would hide a shift."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32, initializer_range=0.5
    )
    model = GPT2LMHeadModel(config).eval()
    padded = sample(model, prompts, fp32(), eos_id=EOS, seed=2)
    assert padded == sample(model, prompts, fp32(batch_size=1), eos_id=EOS, seed=2)


def test_the_seed_decides_everything(small: Any, prompts: list[tuple[int, ...]]) -> None:
    first = sample(small, prompts, fp32(), eos_id=EOS, seed=2)
    torch.manual_seed(123)
    assert sample(small, prompts, fp32(), eos_id=EOS, seed=2) == first
    assert sample(small, prompts, fp32(), eos_id=EOS, seed=3) != first
    # The same prompt asked twice is answered with other random numbers.
    twice = sample(small, [prompts[0]] * 20, fp32(), eos_id=EOS, seed=2)
    assert len(set(twice)) > 5


def test_global_random_states_do_not_change(small: Any, prompts: list[tuple[int, ...]]) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    sample(small, prompts, fp32(), eos_id=EOS, seed=2)
    assert torch.get_rng_state().equal(before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


def test_an_answer_stops_at_its_eos(small: Any, prompts: list[tuple[int, ...]]) -> None:
    drawn = sample(small, prompts * 4, fp32(max_new_tokens=6), eos_id=EOS, seed=5)
    for completion in drawn:
        assert 1 <= len(completion.ids) <= 6
        assert EOS not in completion.ids[:-1]
        assert completion.ended is (completion.ids[-1] == EOS)
        assert completion.ended or len(completion.ids) == 6
    # Also on the very last token that was allowed.
    assert Completion(drawn[0].ids, drawn[0].ended) == drawn[0]
    assert any(c.ended and len(c.ids) == 6 for c in drawn)
    assert any(c.ended and len(c.ids) < 6 for c in drawn)


def test_an_answer_stops_at_any_of_several_ends(small: Any, prompts: list[tuple[int, ...]]) -> None:
    stops = {EOS, EOS - 1}
    drawn = sample(small, prompts * 4, fp32(max_new_tokens=6), eos_id=stops, seed=5)
    for completion in drawn:
        assert not stops & set(completion.ids[:-1])
        assert completion.ended is (completion.ids[-1] in stops)
    assert {c.ids[-1] for c in drawn if c.ended} == stops


def test_answers_come_in_the_order_of_their_prompts(small: Any) -> None:
    # At a temperature near zero each prompt has one answer.
    asked = [(0, 3, 1, 1, 2), (2,), (1, 1, 1), (3, 0)]
    cold = fp32(temperature=1e-4, max_new_tokens=5)
    forwards = sample(small, asked, cold, eos_id=EOS, seed=2)
    assert len({c.ids for c in forwards}) > 1
    assert sample(small, asked[::-1], cold, eos_id=EOS, seed=2) == forwards[::-1]
    seen: list[int] = []
    sample(small, asked, fp32(batch_size=3), eos_id=EOS, seed=2, ranks=SingleRank(seen.append))
    assert seen == [3, 4]


@pytest.mark.usefixtures("real_bf16")
def test_bf16_leaves_the_model_as_it_was(tiny: Path) -> None:
    model = load_model(tiny)
    before = {name: p.clone() for name, p in model.named_parameters()}
    drawn = sample(model, [(5, 6, 7)] * 3, SamplingConfig(max_new_tokens=4), eos_id=0, seed=1)
    assert len(drawn) == 3
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.equal(before[name])


def test_seeds_of_different_names_differ() -> None:
    seeds = {seed_for(0, "a"), seed_for(1, "a"), seed_for(0, "b"), seed_for(0, "a", 0), seed_for(0, "a", "b")}
    assert len(seeds) == 5
    assert seed_for(0, "ab", "c") != seed_for(0, "a", "bc")
    assert all(0 <= s < 2**63 for s in seeds)
