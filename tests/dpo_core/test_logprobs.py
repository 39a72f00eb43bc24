"""Log-probs: shift and mask by hand, against the full softmax, and what must not change them."""

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dpo_core import head
from dpo_core.errors import ModelError
from dpo_core.logprobs import (
    Batch,
    autocast,
    check_definition,
    collate,
    hidden_states,
    length_batches,
    token_logps,
)
from dpo_core.tokens import Sequence


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


def random_sequences(count: int, vocabulary: int, seed: int = 0, longest: int = 12) -> list[Sequence]:
    draw = torch.Generator().manual_seed(seed)

    def ids() -> tuple[int, ...]:
        length = int(torch.randint(1, longest, (1,), generator=draw))
        return tuple(torch.randint(0, vocabulary, (length,), generator=draw).tolist())

    return [Sequence(ids(), ids()) for _ in range(count)]


def test_four_tokens_by_hand() -> None:
    batch = collate([Sequence(prompt=(0, 1), completion=(2, 3))])
    assert batch.completion_BT.tolist() == [[False, False, True, True]]
    # P(2 | 1) = 0.3 and P(3 | 2) = 0.25; P(1 | 0) belongs to the prompt and nothing follows token 3.
    wanted = torch.tensor([[0.0, 0.0, math.log(0.3), math.log(0.25)]])
    torch.testing.assert_close(token_logps(Bigram(TABLE), batch), wanted)
    assert token_logps(Bigram(TABLE), batch).sum(-1).item() == pytest.approx(math.log(0.3 * 0.25))


def test_rows_of_unequal_length_by_hand() -> None:
    rows = [Sequence((0,), (3, 0, 0)), Sequence((1,), (0,)), Sequence((2, 2, 3), (0,))]
    wanted = [math.log(0.4 * 0.7 * 0.1), math.log(0.4), math.log(0.7)]
    assert token_logps(Bigram(TABLE), collate(rows)).sum(-1).tolist() == pytest.approx(wanted)


def test_temperature_and_softcap_by_hand() -> None:
    batch = collate([Sequence((1,), (2,))])
    squared = [p**2 for p in TABLE[1]]
    assert token_logps(Bigram(TABLE), batch, temperature=0.5)[0, 1].item() == pytest.approx(
        math.log(squared[2] / sum(squared))
    )
    capped = [math.exp(2 * math.tanh(math.log(p) / 2)) for p in TABLE[1]]
    assert token_logps(Bigram(TABLE, softcap=2.0), batch)[0, 1].item() == pytest.approx(
        math.log(capped[2] / sum(capped))
    )


def full_logps(model: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
    """The same numbers from the model's own logits, all of them."""
    logits_BTV = model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT).logits / temperature
    logps_BT = torch.log_softmax(logits_BTV[:, :-1], -1).gather(-1, batch.ids_BT[:, 1:, None]).squeeze(-1)
    return torch.cat([torch.zeros_like(logps_BT[:, :1]), logps_BT], 1) * batch.completion_BT


def gradients(model: nn.Module, logps_BT: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    # Unequal weights: with a plain sum, swapped positions would not be seen.
    (logps_BT * torch.linspace(0.5, 2.0, logps_BT.numel()).view_as(logps_BT)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equal_to_the_full_log_softmax(model: Any, seed: int, temperature: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 386, (4, 17), generator=draw)
    attention = (torch.arange(17) < torch.tensor([17, 12, 3, 9])[:, None]).long()
    mask = (torch.rand(4, 17, generator=draw) < 0.4) & attention.bool()
    mask[:, 0], mask[:, 1] = False, True
    batch = Batch(ids, attention, mask)
    ours, theirs = token_logps(model, batch, temperature=temperature), full_logps(model, batch, temperature)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours == 0).equal(~mask)
    ours_grad, theirs_grad = gradients(model, ours), gradients(model, theirs)
    assert len(ours_grad) == len(list(model.parameters()))
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-5, atol=1e-5)


@pytest.fixture
def rows(model: Any) -> list[Sequence]:
    return random_sequences(7, 386, seed=5)


@pytest.fixture
def alone_logps(model: Any, rows: list[Sequence]) -> list[Tensor]:
    """Each row in a batch of its own, without padding."""
    with torch.no_grad():
        return [token_logps(model, collate([row]))[0] for row in rows]


@pytest.fixture(autouse=True)
def _no_grad_left() -> Iterator[None]:
    assert torch.is_grad_enabled()
    yield
    assert torch.is_grad_enabled()


def test_neither_neighbours_nor_padding_nor_order_matter(
    model: Any, rows: list[Sequence], alone_logps: list[Tensor]
) -> None:
    long = Sequence((1,) * 40, (2, 3))
    for pad_id in (0, 7, 385):  # 0 is the end-of-sequence id of this model
        for order in ([0, 1, 2, 3, 4, 5, 6], [6, 2, 0], [3]):
            batch = collate([*(rows[i] for i in order), long], pad_id)
            with torch.no_grad():
                out_BT = token_logps(model, batch)
            for place, index in enumerate(order):
                length = len(rows[index])
                torch.testing.assert_close(out_BT[place, :length], alone_logps[index], rtol=0, atol=1e-5)
                assert not out_BT[place, length:].any()


def test_a_padding_id_equal_to_eos_costs_no_real_eos(model: Any) -> None:
    eos = model.config.eos_token_id
    ended, cut = Sequence((5, 6), (7, eos)), Sequence((5, 6), (7,))
    batch = collate([ended, cut], pad_id=eos)
    assert batch.ids_BT[0].tolist() == batch.ids_BT[1].tolist(), "only the mask tells the two apart"
    with torch.no_grad():
        both_BT = token_logps(model, batch)
        wanted = full_logps(model, collate([ended]))[0]
    torch.testing.assert_close(both_BT[0], wanted, rtol=0, atol=1e-5)
    assert both_BT[0, 3] != 0
    assert both_BT[1].tolist() == pytest.approx([0, 0, wanted[2].item(), 0], abs=1e-5)


def test_what_the_prompt_predicts_does_not_enter(model: Any, rows: list[Sequence]) -> None:
    batch = collate(rows)
    with torch.no_grad():
        hidden_BTH = hidden_states(model, batch)
        before = token_logps(model, batch, hidden_BTH=hidden_BTH)
        # Every position whose next token is no completion token: prompts but for their end, and padding.
        silent_BT = ~torch.cat([batch.completion_BT[:, 1:], torch.zeros(len(rows), 1).bool()], 1)
        assert silent_BT.any()
        noisy_BTH = hidden_BTH + 100 * torch.randn(hidden_BTH.shape) * silent_BT[..., None]
        after = token_logps(model, batch, hidden_BTH=noisy_BTH)
        wrong = token_logps(model, batch, hidden_BTH=hidden_BTH + 1.0 * torch.randn(hidden_BTH.shape))
    assert after.equal(before)
    assert not wrong.allclose(before)


def test_recomputed_chunks_give_the_kept_values(
    model: Any, rows: list[Sequence], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = collate(rows)
    passes: list[int] = []
    real = head._log_softmax

    def counted(*args: Any) -> Any:
        passes.append(1)
        return real(*args)

    monkeypatch.setattr(head, "_log_softmax", counted)
    kept = token_logps(model, batch)
    kept_grad = gradients(model, kept)
    assert len(passes) == 1, "what was kept is not computed again"
    chunks = math.ceil(int(batch.completion_BT.sum()) / 5)
    monkeypatch.setattr(head, "CHUNK_TOKENS", 5)
    monkeypatch.setattr(head, "KEEP_LOGITS_BYTES", 0)
    passes.clear()
    recomputed = token_logps(model, batch)
    assert len(passes) == chunks > 1
    torch.testing.assert_close(recomputed, kept, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradients(model, recomputed), kept_grad, rtol=1e-5, atol=1e-6)
    assert len(passes) == 2 * chunks


def test_bf16_keeps_the_head_in_fp32(model: Any, rows: list[Sequence]) -> None:
    batch = collate(rows)
    with torch.no_grad():
        exact = token_logps(model, batch).sum(-1)
        with autocast("bf16"):
            hidden_BTH = hidden_states(model, batch)
            rounded_BT = token_logps(model, batch, hidden_BTH=hidden_BTH)
    assert rounded_BT.dtype == torch.float32
    # The head alone, done again outside autocast on the same hidden states, gives the same bits.
    with torch.no_grad():
        assert token_logps(model, batch, hidden_BTH=hidden_BTH.float()).equal(rounded_BT)
    assert rounded_BT.sum(-1).tolist() != exact.tolist()
    torch.testing.assert_close(rounded_BT.sum(-1), exact, rtol=0, atol=0.1)


def test_a_sequence_without_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt"):
        collate([Sequence((1,), (2,)), Sequence((), (2, 3))])


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


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Gemma2"])
def test_known_architectures_fit_the_definition(name: str) -> None:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    batch = collate(random_sequences(3, 50, seed=1, longest=6))
    check_definition(model, batch)
    with torch.no_grad():
        torch.testing.assert_close(
            token_logps(model, batch), full_logps(model, batch), rtol=0, atol=1e-5, check_dtype=False
        )


def test_an_architecture_that_scales_its_logits_is_refused() -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    batch = collate(random_sequences(3, 50, seed=1, longest=6))
    with pytest.raises(ModelError, match="scales or shifts its logits"):
        check_definition(GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0)).eval(), batch)


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
