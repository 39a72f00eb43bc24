"""The pack plan of an epoch: full steps, level packs, little padding, the same on every rank."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_core.data.config import DataConfig
from dpo_core.data.load import load
from dpo_core.errors import RecipeError
from dpo_core.training.pack_plan import plan_epoch
from tests.support.models.tiny import make_tokenizer


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=120),
    st.integers(1, 40),
    st.integers(200, 900),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_every_step_holds_its_batch_and_every_rank_as_many_packs(lengths, batch_size, budget, world, epoch):
    lengths_E = np.array(lengths)
    if min(batch_size, len(lengths)) < world:
        with pytest.raises(RecipeError, match="cannot be shared"):
            plan_epoch(lengths_E, batch_size, budget, world=world, seed=1, epoch=epoch)
        return
    if min(batch_size, len(lengths)) % world:
        budget += 200  # else two of the longest may have to share a pack: refused, tested below
    plan = plan_epoch(lengths_E, batch_size, budget, world=world, seed=1, epoch=epoch)
    batch = min(batch_size, len(lengths))
    assert plan.steps == max(1, len(lengths) // batch)
    used: list[int] = []
    for step in range(plan.steps):
        ranks = [plan.of_step(step, rank, world) for rank in range(world)]
        assert len({len(packs) for packs in ranks}) == 1, "ZeRO-3 needs as many forwards on every rank"
        assert sum(len(pack) for packs in ranks for pack in packs) == batch
        used += [int(i) for packs in ranks for pack in packs for i in pack]
    assert len(used) == len(set(used)) == plan.steps * batch
    loads = [int(lengths_E[pack].sum()) for pack in plan.packs]
    assert max(loads) == plan.length <= budget
    assert all(len(pack) for pack in plan.packs), "no rank is left without work"
    assert 0 <= plan.waste < 1


def test_ranks_share_the_packs_of_one_process():
    lengths_E = np.random.default_rng(0).integers(20, 400, 200)
    alone = plan_epoch(lengths_E, 40, 4000, world=2, seed=0, epoch=0)
    both = [alone.of_step(1, rank, 2) for rank in range(2)]
    assert sorted(int(i) for packs in both for p in packs for i in p) == sorted(
        int(i) for p in alone.of_step(1) for i in p
    )


def test_epochs_differ_and_a_plan_can_be_made_again():
    lengths_E = np.random.default_rng(0).integers(20, 400, 300)

    def packs(epoch):
        plan = plan_epoch(lengths_E, 50, 4000, world=1, seed=3, epoch=epoch)
        return [frozenset(p.tolist()) for p in plan.packs]

    assert packs(0) == packs(0)
    together = [{(a, b) for p in packs(e) for a in p for b in p if a < b} for e in (0, 1)]
    chance = len(together[1]) / (300 * 299 / 2)
    assert len(together[0] & together[1]) / len(together[0]) < 3 * chance, "other examples meet each epoch"


def test_a_pair_longer_than_a_pack_is_named_with_the_remedy():
    with pytest.raises(RecipeError, match=r"has 900 tokens, more than a pack \(512\)") as caught:
        plan_epoch(np.array([10, 900]), 2, 512, world=1, seed=0, epoch=0)
    assert "pack_tokens to 900" in caught.value.remedy


def test_a_batch_whose_packs_exceed_the_budget_is_refused():
    with pytest.raises(RecipeError, match="together exceed 512") as caught:
        plan_epoch(np.array([400, 400, 400]), 3, 512, world=2, seed=0, epoch=0)
    assert caught.value.remedy == "Make batch_size a multiple of 2, or raise pack_tokens to 800 or more"


def test_a_million_examples_are_planned_in_seconds():
    lengths_E = np.random.default_rng(0).lognormal(5, 0.5, 1_000_000).astype(np.int64).clip(8, 4000)
    plan = plan_epoch(lengths_E, 512, 8192, world=8, seed=0, epoch=0)
    assert plan.waste < 0.02


def test_waste_on_human_pairs_is_below_three_percent(shared):
    """Lengths in the tokens of a small tokenizer: the distribution is what matters here."""
    frame = load(DataConfig(path=str(shared / "data/preference/hh_harmless_base_test.jsonl.gz"))).frame
    tokenizer = make_tokenizer()
    columns = {
        side: np.array([len(ids) // 2 + 1 for ids in tokenizer(frame[side].tolist())["input_ids"]])
        for side in ("prompt", "chosen", "rejected")
    }
    lengths_E = np.minimum(columns["prompt"], 256) + np.minimum(columns["chosen"], 256)
    lengths_E = lengths_E + np.minimum(columns["rejected"], 256)
    for batch_size in (16, 64, 128, 256):
        plan = plan_epoch(lengths_E, batch_size, 8192, world=1, seed=0, epoch=0)
        assert plan.waste < 0.03
        fixed = -(-plan.length // 128) * 128
        assert 1 - plan.tokens / (fixed * len(plan.packs)) < 0.04, "rounded up to blocks of 128"
