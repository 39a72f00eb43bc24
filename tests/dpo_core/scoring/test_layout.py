"""Packs against padded rows: the same log-probs and gradients, independent of other documents."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.generation.next_token import cache_is_exact
from dpo_core.scoring.attention import _blocks, block_mask, has_flex_heads
from dpo_core.scoring.autocast import autocast
from dpo_core.scoring.branch_scores import branch_scores, hidden_of
from dpo_core.scoring.document import Document
from dpo_core.scoring.layout import pack, pad
from dpo_core.scoring.packing_check import packing_fault, share_trials
from tests.support.models.logps import full_logps

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def documents(count: int, seed: int, longest: int = 12, branches: int = 2) -> list[Document]:
    generator = np.random.default_rng(seed)

    def tokens() -> tuple[int, ...]:
        return tuple(generator.integers(0, 61, generator.integers(1, longest + 1)).tolist())

    return [Document(tokens(), tuple(tokens() for _ in range(branches))) for _ in range(count)]


def test_a_pack_holds_each_prompt_once_and_no_last_token():
    made = pack([Document((1, 2, 3), ((4, 5), (6, 7, 8))), Document((9,), ((10,), (11, 12)))])
    assert made.ids_T.tolist() == [1, 2, 3, 4, 6, 7, 9, 11]
    assert made.positions_T.tolist() == [0, 1, 2, 3, 3, 4, 0, 1]
    assert made.branch_T.tolist() == [0, 0, 0, 1, 2, 2, 0, 2]
    assert made.document_T.tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert made.predicts_N.tolist() == [2, 3, 2, 4, 5, 6, 6, 7]
    assert made.targets_N.tolist() == [4, 5, 6, 7, 8, 10, 11, 12]
    assert made.lengths_S.tolist() == [2, 3, 1, 2]
    assert made.prompt_predicts_M.tolist() == [0, 1]
    assert made.prompt_targets_M.tolist() == [2, 3]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_packs_equal_padded_rows_in_log_probs_and_gradients(family):
    torch.manual_seed(1)
    model = llama() if family == "llama" else Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()
    chosen = documents(7, seed=3)
    weights = torch.randn(14, 12)

    def run(layout):
        model.zero_grad()
        scores = branch_scores(model, layout)
        table = torch.zeros(14, 12)
        table[:, : scores.logps_SL.shape[1]] = scores.logps_SL
        (table * weights).sum().backward()
        return table.detach(), [p.grad.clone() for p in model.parameters()]

    packed, padded = run(pack(chosen)), run(pad(chosen))
    torch.testing.assert_close(packed[0], padded[0], rtol=0, atol=1e-5)
    for ours, theirs in zip(packed[1], padded[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    filled = run(pack(chosen, pad_to=256))
    torch.testing.assert_close(filled[0], padded[0], rtol=0, atol=1e-5)


def test_each_branch_reads_what_it_would_read_alone():
    model = llama()
    chosen = documents(5, seed=4, branches=3)
    with torch.no_grad():
        scores = branch_scores(model, pack(chosen))
        for s, (d, tokens) in enumerate((one, t) for one in chosen for t in one.branches):
            alone = full_logps(model, TokenSequence(d.prompt, tokens))
            torch.testing.assert_close(scores.logps_SL[s, : len(tokens)], alone, rtol=0, atol=1e-5)
            assert scores.logps_SL[s, len(tokens) :].eq(0).all()


def test_a_changed_branch_changes_no_other():
    model = llama()
    one = Document((1, 2, 3), ((4, 5, 6), (7, 8, 9)))
    other = Document((1, 2, 3), ((40, 50, 60), (7, 8, 9)))
    with torch.no_grad():
        a, b = (branch_scores(model, pack([d, one])).logps_SL for d in (one, other))
    assert not a[0].equal(b[0])
    torch.testing.assert_close(a[1:], b[1:], rtol=0, atol=1e-5)


def test_the_prompt_is_scored_once_a_document():
    model = llama()
    chosen = documents(4, seed=5)
    with torch.no_grad():
        packed = branch_scores(model, pack(chosen), prompts=True).prompt_D
        padded = branch_scores(model, pad(chosen), prompts=True).prompt_D
        alone = [
            full_logps(model, TokenSequence(d.prompt[:1], d.prompt[1:])).sum() if d.prompt[1:] else 0.0
            for d in chosen
        ]
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-5)
    torch.testing.assert_close(packed, torch.tensor(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", [(1,), (1, 1), (3, 1), (1, 3, 1)], ids=str)
@pytest.mark.parametrize("lay_out", [pad, pack])
def test_a_prompt_of_one_token_has_the_log_prob_zero(lay_out, lengths):
    """Nothing predicts its token; documents are counted, wherever such a prompt stands."""
    model = llama()
    chosen = [Document(tuple(range(5, 5 + n)), ((7, 8), (9, 10, 11))) for n in lengths]
    scores = branch_scores(model, lay_out(chosen), prompts=True)
    assert scores.prompt_D.shape == (len(lengths),)
    assert [bool(value) for value in scores.prompt_D] == [n > 1 for n in lengths]
    (scores.prompt_D.sum() + scores.logps_SL.sum()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_live_reference_kl_sharpness_and_entropy_are_those_of_the_full_distributions():
    model, reference = llama(0), llama(1)
    layout = pack(documents(3, seed=6))
    scores = branch_scores(model, layout, reference=reference, kl=True, sharpness=True)
    with torch.no_grad():
        logps = torch.log_softmax(model.lm_head(hidden_of(model, layout))[layout.predicts_N], -1)
        ref = torch.log_softmax(reference.lm_head(hidden_of(reference, layout))[layout.predicts_N], -1)
    kl = torch.nn.functional.kl_div(logps, ref, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(scores.kl_SL, layout.table(kl), rtol=0, atol=1e-5, check_dtype=False)
    assert scores.kl_SL.requires_grad
    assert (kl >= 0).all()
    assert not scores.ref_logps_SL.requires_grad
    assert not scores.sharpness_SL.requires_grad
    sharpness = logps.gather(-1, layout.targets_N[:, None])[:, 0] - logps.exp().pow(2).sum(-1).log()
    torch.testing.assert_close(scores.sharpness_SL, layout.table(sharpness), rtol=0, atol=1e-5)
    spread = branch_scores(model, layout, entropy=True).entropy_SL
    torch.testing.assert_close(spread, layout.table(-(logps.exp() * logps).sum(-1)), rtol=0, atol=1e-5)
    assert not spread.requires_grad
    same = branch_scores(model, layout, reference=model, kl=True)
    assert same.kl_SL.abs().max() < 1e-6
    assert same.logps_SL.detach().sub(same.ref_logps_SL).abs().max() < 1e-6


def test_a_token_that_neither_model_can_write_adds_nothing_to_the_kl():
    """A logit of -inf, as of vocabulary that is padding: 0·log 0 is 0, in the value and in the gradient."""
    model, reference = llama(0), llama(1)
    layout = pack([Document((1, 2, 3), ((4, 5), (6, 7, 8)))])
    for one in (model, reference):
        one.lm_head.bias = torch.nn.Parameter(torch.zeros(61).index_fill(0, torch.tensor([60]), -torch.inf))
    kl_SL = branch_scores(model, layout, reference=reference, kl=True).kl_SL
    kl_SL.sum().backward()
    assert kl_SL.isfinite().all()
    assert kl_SL.max() > 1e-4
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_recomputed_chunks_give_the_same_gradients(monkeypatch):
    model, reference, layout = llama(0), llama(1), pack(documents(6, seed=7))

    def gradients():
        model.zero_grad()
        scores = branch_scores(model, layout, reference=reference, kl=True)
        (scores.logps_SL.sum() + scores.kl_SL.sum()).backward()
        return [p.grad.clone() for p in model.parameters()]

    stored = gradients()
    monkeypatch.setattr("dpo_core.scoring.flops.KEEP_LOGITS_BYTES", 0)
    monkeypatch.setattr("dpo_core.scoring.lm_head.CHUNK_TOKENS", 5)
    for a, b in zip(stored, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def dense_mask(layout) -> np.ndarray:
    document, branch = layout.document_T.numpy(), layout.branch_T.numpy()
    allowed = (document[:, None] == document) & ((branch == 0) | (branch[:, None] == branch))
    return allowed & np.tri(len(document), dtype=bool)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10**6), st.integers(1, 300), st.integers(1, 3))
def test_blocks_cover_exactly_what_may_be_seen(count, seed, longest, branches):
    chosen = documents(count, seed, longest, branches)
    tokens = sum(map(len, chosen))
    layout = pack(chosen, pad_to=-(-tokens // 128) * 128)
    partial, full = _blocks(layout.document_T.numpy(), layout.branch_T.numpy())
    blocks = dense_mask(layout).reshape(len(partial), 128, len(partial), 128).transpose(0, 2, 1, 3)
    assert not (partial & full).any()
    assert blocks[full].all(), "a block taken whole is seen whole"
    assert not blocks[~partial & ~full].any(), "no visible pair lies in a block left out"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("window", [1, 3, 16, 400])
def test_packs_keep_the_window_of_a_layer(window, precision):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window)).eval()
    chosen = documents(6, seed=4, longest=30)
    results = []
    for layout in (pad(chosen), pack(chosen, pad_to=384)):
        model.zero_grad()
        with autocast(precision):
            logps = branch_scores(model, layout).logps_SL
        logps.sum().backward()
        results.append((logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (rows, rows_grad), (packs, packs_grad) = results
    exact = precision == "fp32"
    torch.testing.assert_close(packs, rows, rtol=0, atol=1e-5 if exact else 0.05)
    assert (packs_grad - rows_grad).norm() <= (1e-5 if exact else 0.05) * rows_grad.norm()


@pytest.mark.parametrize(("heads", "given", "flex"), [(2, None, True), (4, None, False), (4, 16, True)])
def test_flex_attention_wants_heads_of_sixteen(heads, given, flex):
    assert has_flex_heads(LlamaConfig(hidden_size=32, num_attention_heads=heads, head_dim=given)) == flex


@pytest.mark.slow  # compiles for ten seconds; its mask is compared block by block above
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"),
    reason="torch compiles FlexAttention for AVX2 and wider alone",
)
def test_flex_attention_equals_attention_by_document():
    model, layout = llama(), pack(documents(9, seed=8), pad_to=256)
    trunk = model.get_decoder()
    inputs = {"input_ids": layout.ids_T[None], "position_ids": layout.positions_T[None], "use_cache": False}
    with torch.no_grad():
        rows = hidden_of(model, layout)
        flex = trunk(**inputs, attention_mask=block_mask(layout)).last_hidden_state[0]
    real = layout.document_T < 9
    torch.testing.assert_close(flex[real], rows[real], rtol=0, atol=1e-5)


def test_padded_rows_after_a_pack_are_what_they_were_before():
    model, chosen = llama(), documents(5, seed=10)
    with torch.no_grad():
        before = branch_scores(model, pad(chosen)).logps_SL
        branch_scores(model, pack(chosen))
        assert branch_scores(model, pad(chosen)).logps_SL.equal(before)
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape == (1, 7)


BLOOM = {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 2}


def test_an_architecture_that_cannot_share_is_found_out():
    torch.manual_seed(0)
    assert packing_fault(llama(), 60, thorough=True) is None
    bloom = BloomForCausalLM(BloomConfig(**BLOOM)).eval()
    assert "packs" in packing_fault(bloom, 60), "ALiBi reads places, not positions"


def test_a_model_is_tried_once_for_each_length():
    model, passes = llama(), []
    model.get_decoder().register_forward_hook(lambda *_: passes.append(1))
    assert packing_fault(model, 60) is None
    tried = len(passes)
    assert packing_fault(model, 60) is None
    assert len(passes) == tried > 0
    assert packing_fault(model, 61) is None
    assert len(passes) > tried


def test_checkpoints_of_one_architecture_are_tried_once_together():
    trials: dict = {}
    models, passes = [llama(), llama(), BloomForCausalLM(BloomConfig(**BLOOM)).eval()], [0, 0, 0]
    for number, model in enumerate(models):
        trunk = model.get_decoder() if number < 2 else model.transformer
        trunk.register_forward_hook(lambda *_, number=number: passes.__setitem__(number, passes[number] + 1))
        share_trials(model, trials)
        assert cache_is_exact(model) or number == 2
        assert (packing_fault(model, 60) is None) == (number < 2)
    assert passes[0] > 0
    assert passes[1] == 0
    assert passes[2] > 0, "another architecture"


@pytest.mark.parametrize("lay_out", [pack, pad])
def test_tokens_that_are_not_learnt_are_read_and_not_scored(lay_out):
    model = llama()
    prompt, first, second = (1, 2, 3), (4, 5, 6, 7), (8, 9, 10)
    mask = (False, True, False, True)
    masked = Document.of(TokenSequence(prompt, first, learnt=mask), TokenSequence(prompt, second))
    whole = Document(prompt, (first, second))
    scores, all_of_them = (branch_scores(model, lay_out([one])) for one in (masked, whole))
    assert scores.lengths_S.tolist() == [2, 3]
    torch.testing.assert_close(scores.logps_SL[0, :2], all_of_them.logps_SL[0, [1, 3]])
    torch.testing.assert_close(scores.logps_SL[1], all_of_them.logps_SL[1, :3])
    with pytest.raises(ValueError, match="predicted"):
        lay_out([Document(prompt, (first,), ((False,) * 4,))])
