"""Log-probs: shift and mask by hand, against the full softmax, and invariances."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.errors import ModelError
from dpo_core.model_check import check_definition
from dpo_core.scoring import attention
from dpo_core.scoring import flops as cost
from dpo_core.scoring import lm_head as head
from dpo_core.scoring.autocast import autocast
from dpo_core.scoring.branch_scores import branch_scores, hidden_of, token_scores
from dpo_core.scoring.completion_scores import completion_logps, length_batches
from dpo_core.scoring.document import Document
from dpo_core.scoring.layout import PaddedRows, pad
from tests.support.models.logps import full_logps, random_sequences


class Bigram(nn.Module):
    """The smallest language model: the next token depends on the present one alone, by a table."""

    def __init__(self, probabilities: list[list[float]], softcap: float | None = None) -> None:
        super().__init__()
        table = torch.tensor(probabilities).log()
        self.embed = nn.Embedding.from_pretrained(torch.eye(len(table)))
        self.head = nn.Linear(*table.shape, bias=False)
        self.head.weight.data = table.T.contiguous()
        self.config = SimpleNamespace(final_logit_softcapping=softcap)

    def get_decoder(self) -> Any:
        return lambda input_ids, **_: SimpleNamespace(last_hidden_state=self.embed(input_ids))

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


# Row: the present token; column: the next one.
TABLE = [[0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]]


def padded(sequences: list[TokenSequence]) -> PaddedRows:
    return pad([Document(s.prompt, (s.completion,)) for s in sequences])


def logps_of(model: Any, rows: PaddedRows, temperature: float = 1.0) -> Tensor:
    hidden_NH = hidden_of(model, rows)[rows.predicts_N]
    return rows.table(token_scores(model, hidden_NH, rows.targets_N, temperature=temperature)["logps"])


def test_four_tokens_by_hand() -> None:
    rows = padded([TokenSequence(prompt=(0, 1), completion=(2, 3))])
    # P(2 | 1) = 0.3 and P(3 | 2) = 0.25; P(1 | 0) belongs to the prompt and nothing follows token 3.
    expected = torch.tensor([[math.log(0.3), math.log(0.25)]])
    torch.testing.assert_close(branch_scores(Bigram(TABLE), rows).logps_SL, expected)


def test_rows_of_unequal_length_by_hand() -> None:
    rows = [TokenSequence((0,), (3, 0, 0)), TokenSequence((1,), (0,)), TokenSequence((2, 2, 3), (0,))]
    expected = [math.log(0.4 * 0.7 * 0.1), math.log(0.4), math.log(0.7)]
    assert branch_scores(Bigram(TABLE), padded(rows)).logps_SL.sum(-1).tolist() == pytest.approx(expected)


def test_temperature_and_softcap_by_hand() -> None:
    rows = padded([TokenSequence((1,), (2,))])
    squared = [p**2 for p in TABLE[1]]
    assert logps_of(Bigram(TABLE), rows, temperature=0.5).item() == pytest.approx(
        math.log(squared[2] / sum(squared))
    )
    capped = [math.exp(2 * math.tanh(math.log(p) / 2)) for p in TABLE[1]]
    assert logps_of(Bigram(TABLE, softcap=2.0), rows).item() == pytest.approx(
        math.log(capped[2] / sum(capped))
    )


def gradients(model: nn.Module, logps_BL: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    # Unequal weights: with a plain sum, swapped positions would not be seen.
    (logps_BL * torch.linspace(0.5, 2.0, logps_BL.numel()).view_as(logps_BL)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def sequences() -> list[TokenSequence]:
    return random_sequences(7, 386, seed=5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equal_to_the_full_log_softmax(
    model: Any, sequences: list[TokenSequence], temperature: float
) -> None:
    rows = padded(sequences)
    ours = logps_of(model, rows, temperature)
    theirs = rows.table(torch.cat([full_logps(model, s, temperature) for s in sequences]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    ours_grad, theirs_grad = gradients(model, ours), gradients(model, theirs)
    assert len(ours_grad) == len(list(model.parameters()))
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-5, atol=1e-5)


def test_an_end_of_sequence_token_is_data_and_padding_is_none(model: Any) -> None:
    eos = model.config.eos_token_id  # 0, which padding is filled with
    ended, cut = TokenSequence((5, 6), (7, eos)), TokenSequence((5, 6), (7,))
    with torch.no_grad():
        logps = branch_scores(model, padded([ended, cut])).logps_SL
        torch.testing.assert_close(logps[0], full_logps(model, ended), rtol=0, atol=1e-5)
    assert logps[0, 1] != 0
    assert logps[1].tolist() == pytest.approx([logps[0, 0].item(), 0], abs=1e-5)


def families(seed: int) -> list[TokenSequence]:
    """Sequences of which one to six in turn share a prompt, in random order."""
    made = [
        TokenSequence(one.prompt, other.completion)
        for k, one in enumerate(random_sequences(6, 386, seed), 1)
        for other in random_sequences(k, 386, seed + k)
    ]
    return [made[i] for i in np.random.default_rng(seed).permutation(len(made))]


@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_completions_come_as_each_alone_whatever_shares_their_pass(model: Any, budget: int) -> None:
    sequences = families(3)
    fed: list[int] = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, given: fed.append(given["input_ids"].numel()), with_kwargs=True
    )
    by_index: dict[int, Tensor] = {}
    passes = 0
    model.train()
    for logps in completion_logps(model, sequences, "fp32", budget):
        assert not set(logps) & set(by_index)
        by_index |= logps
        passes += 1
    handle.remove()
    assert torch.is_grad_enabled()
    assert sorted(by_index) == list(range(len(sequences)))
    with torch.no_grad():
        for index, sequence in enumerate(sequences):
            alone = full_logps(model, sequence)
            torch.testing.assert_close(by_index[index], alone, rtol=0, atol=1e-5)
    fed = fed[-passes:]
    assert max(fed) <= max(budget, *(len(s) - 1 for s in sequences))
    if budget == 10_000:
        # Each prompt once for four completions; last tokens are not fed.
        alike: dict[tuple[int, ...], int] = {}
        for sequence in sequences:
            alike[sequence.prompt] = alike.get(sequence.prompt, 0) + 1
        prompts = sum(len(prompt) * -(-count // 4) for prompt, count in alike.items())
        assert sum(fed) == prompts + sum(len(s.completion) - 1 for s in sequences)


SIZES = {
    "vocab_size": 386,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("name", ["no sharing", "a short window", "a long window"])
def test_a_model_that_cannot_share_prompts_reads_rows_and_windows_are_kept(name: str) -> None:
    torch.manual_seed(0)
    if name == "no sharing":
        model: Any = BloomForCausalLM(BloomConfig(vocab_size=386, hidden_size=32, n_layer=2, n_head=2)).eval()
    else:
        window = 120 if name == "a short window" else 256
        model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window)).eval()
    packs: list[bool] = []
    trunk = attention.trunk_of(model)
    long = tuple(range(150))
    sequences = [*families(3), TokenSequence(long[:100], long[100:])]
    trunk.register_forward_pre_hook(lambda *a: packs.append("parts" in a[-1]), with_kwargs=True)
    by_index = {i: x for part in completion_logps(model, sequences, "fp32", 4096) for i, x in part.items()}
    assert packs[-1] == (name != "no sharing")
    with torch.no_grad():
        for index, sequence in enumerate(sequences):
            torch.testing.assert_close(by_index[index], full_logps(model, sequence), rtol=0, atol=1e-5)


def test_what_the_prompt_predicts_does_not_enter(model: Any, sequences: list[TokenSequence]) -> None:
    rows = padded(sequences)
    with torch.no_grad():
        hidden = hidden_of(model, rows)

        def scored(noise: Tensor) -> Tensor:
            return token_scores(model, (hidden + noise)[rows.predicts_N], rows.targets_N)["logps"]

        before = scored(torch.zeros_like(hidden))
        # Every position whose next token is no completion token: prompts but for their end, and padding.
        silent = torch.ones(len(hidden), dtype=torch.bool)
        silent[rows.predicts_N] = False
        assert silent.any()
        assert scored(100 * torch.randn(hidden.shape) * silent[:, None]).equal(before)
        assert not scored(torch.randn(hidden.shape)).allclose(before)


def test_recomputed_chunks_give_the_kept_values(
    model: Any, sequences: list[TokenSequence], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = padded(sequences)
    passes: list[int] = []
    real = head._log_softmax

    def counted(*args: Any) -> Any:
        passes.append(1)
        return real(*args)

    monkeypatch.setattr(head, "_log_softmax", counted)
    stored = branch_scores(model, rows).logps_SL
    stored_grad = gradients(model, stored)
    assert len(passes) == 1, "what was kept is not computed again"
    chunks = math.ceil(len(rows.targets_N) / 5)
    monkeypatch.setattr(head, "CHUNK_TOKENS", 5)
    monkeypatch.setattr(cost, "KEEP_LOGITS_BYTES", 0)
    passes.clear()
    recomputed = branch_scores(model, rows).logps_SL
    assert len(passes) == chunks > 1
    torch.testing.assert_close(recomputed, stored, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients(model, recomputed), stored_grad, rtol=1e-5, atol=1e-5)
    assert len(passes) == 2 * chunks


@pytest.mark.usefixtures("real_bf16")
def test_bf16_keeps_the_head_in_fp32(model: Any, sequences: list[TokenSequence]) -> None:
    rows = padded(sequences)
    with torch.no_grad():
        exact = branch_scores(model, rows).logps_SL.sum(-1)
        with autocast("bf16"):
            hidden_NH = hidden_of(model, rows)[rows.predicts_N]
            rounded_N = token_scores(model, hidden_NH, rows.targets_N)["logps"]
        assert rounded_N.dtype == torch.float32
        # The head alone, done again outside autocast on the same hidden states, gives the same bits.
        assert token_scores(model, hidden_NH.float(), rows.targets_N)["logps"].equal(rounded_N)
    rounded = rows.table(rounded_N).sum(-1)
    assert rounded.tolist() != exact.tolist()
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.1)


@pytest.mark.usefixtures("real_bf16")
def test_bf16_packs_are_as_near_to_fp32_as_bf16_rows(model: Any) -> None:
    sequences = families(4)
    exact, packed = (
        {i: x for part in completion_logps(model, sequences, p, 512) for i, x in part.items()}
        for p in ("fp32", "bf16")
    )
    gaps = [float((packed[i] - exact[i]).sum().abs()) for i in range(len(sequences))]
    assert 0 < max(gaps) < 0.1


def test_a_sequence_without_a_prompt_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="prompt"):
        next(completion_logps(model, [TokenSequence((1,), (2,)), TokenSequence((), (2, 3))], "fp32", 64))


SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,
}


# Fields that scale or bound the logits, with values that show.
HEADS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Gemma2": {"final_logit_softcapping": 2.0},
    "Granite": {"logits_scaling": 8.0},
    "Cohere": {"logit_scale": 0.25},
    "Cohere2": {"logit_scale": 0.25},
    "HyperCLOVAX": {"logits_scaling": 3.0},
}


def small(name: str, **changes: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL | HEADS[name] | changes)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_known_architectures_fit_the_definition(name: str, temperature: float) -> None:
    model = small(name)
    sequences = random_sequences(3, 50, seed=1, longest=6)
    check_definition(model)
    rows = padded(sequences)
    ours = logps_of(model, rows, temperature)
    theirs = rows.table(torch.cat([full_logps(model, s, temperature) for s in sequences]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for mine, full in zip(gradients(model, ours).values(), gradients(model, theirs).values(), strict=True):
        torch.testing.assert_close(mine, full, rtol=1e-4, atol=1e-5)


def test_an_architecture_that_changes_its_logits_in_an_unknown_way_is_refused() -> None:
    model = small("Llama")
    model.lm_head.register_forward_hook(lambda module, ids, logits_BTV: logits_BTV * 3)
    with pytest.raises(ModelError, match="not its trunk with a linear head"):
        check_definition(model)


@given(lengths=st.lists(st.integers(1, 300), max_size=40), budget=st.integers(1, 1000))
def test_length_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    groups = length_batches(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    flat = [lengths[i] for group in groups for i in group]
    assert flat == sorted(flat, reverse=True)
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget
    # No group could have taken in the first row of the next.
    for group in groups[:-1]:
        assert (len(group) + 1) * lengths[group[0]] > budget


def test_casts_of_weights_are_kept_for_the_passes_and_no_longer(model: Any) -> None:
    sequences = [TokenSequence((1, 2, 3), (4, 5, n)) for n in range(6)]
    before = [one for passes in completion_logps(model, sequences, "bf16", 16) for one in passes.values()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after = [one for passes in completion_logps(model, sequences, "bf16", 16) for one in passes.values()]
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(before, after, strict=True))
    assert not torch.is_autocast_enabled("cpu")
