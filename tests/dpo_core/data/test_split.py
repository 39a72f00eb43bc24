"""Splits by prompt: no prompt is on both sides, and adding rows moves no prompt."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_core.data.config import DataConfig
from dpo_core.data.layouts.fields import PairFields
from dpo_core.data.load import load
from dpo_core.data.records import to_frame
from dpo_core.data.split import prompt_key, split_by_prompt, with_eval_frame
from dpo_core.errors import DataError

PROMPTS = st.lists(st.text(st.characters(codec="utf-8"), max_size=6), min_size=1, max_size=30)
SEEDS = st.integers(0, 2**31)


def frame_of(prompts: list[str]):
    return to_frame([PairFields(prompt, False, "c", "r") for prompt in prompts])


@settings(max_examples=150, deadline=None)
@given(PROMPTS, st.floats(0.01, 0.99), SEEDS)
def test_no_prompt_on_both_sides_and_both_sides_used(prompts: list[str], fraction: float, seed: int) -> None:
    keys = {prompt_key(prompt) for prompt in prompts}
    if len(keys) < 2:
        with pytest.raises(DataError, match="1 distinct prompt"):
            split_by_prompt(frame_of(prompts), fraction, seed)
        return
    split = split_by_prompt(frame_of(prompts), fraction, seed)
    sides = {side: {prompt_key(p) for p in rows["prompt"]} for side, rows in split.groupby("split")}
    assert set(sides) == {"train", "eval"}
    assert not sides["train"] & sides["eval"]
    assert sides["train"] | sides["eval"] == keys


@settings(max_examples=100, deadline=None)
@given(st.integers(60, 90), st.lists(st.text(max_size=5), max_size=10), SEEDS)
def test_more_rows_move_no_prompt(n: int, more: list[str], seed: int) -> None:
    """From 60 prompts on and at one half, the hash alone decides (the chance of an empty side is 2^-59)."""
    old = [f"prompt {i}" for i in range(n)]
    new = [text for text in more if text.isprintable()]
    before = split_by_prompt(frame_of(old), 0.5, seed)
    after = split_by_prompt(frame_of([*new, *reversed(old)]), 0.5, seed)
    where = dict(zip(after["prompt"], after["split"], strict=True))
    assert [where[prompt] for prompt in old] == list(before["split"])


def test_share_seed_and_rows_of_one_prompt() -> None:
    frame = frame_of([f"prompt {i // 3}" for i in range(6000)])
    split = split_by_prompt(frame, 0.1, 7)
    assert 0.08 < (split["split"] == "eval").mean() < 0.12
    assert split.groupby("prompt")["split"].nunique().max() == 1
    assert split["split"].equals(split_by_prompt(frame, 0.1, 7)["split"])
    assert not split["split"].equals(split_by_prompt(frame, 0.1, 8)["split"])


def test_prompts_that_differ_in_form_only_stay_together() -> None:
    same = ["Tell me a joke.", "  tell me\na JOKE. ", "Tell\u00a0me a joke\uff0e"]
    assert len({prompt_key(prompt) for prompt in same}) == 1
    assert prompt_key('[{"role":"user","content":"Tell me a joke."}]', chat=True) == prompt_key(same[0])
    split = split_by_prompt(frame_of([*same, *(f"other {i}" for i in range(50))]), 0.3, 1)
    assert split["split"][:3].nunique() == 1


def test_rows_with_a_fault_are_no_prompt() -> None:
    bad = PairFields("", False, "", "", fault="broken")
    message = (
        r"1 distinct prompt.* in 1 usable rows \(of the others, 2, most often: broken\).*data\.eval_path"
    )
    with pytest.raises(DataError, match=message):
        split_by_prompt(to_frame([bad, PairFields("p", False, "c", "r"), bad]), 0.5, 0)
    split = split_by_prompt(
        to_frame([bad, PairFields("p", False, "c", "r"), PairFields("q", False, "c", "r")]), 0.5, 0
    )
    assert split["split"][0] == "train"
    assert set(split["split"][1:]) == {"train", "eval"}


def test_pandalm_has_many_pairs_a_prompt(shared: Path) -> None:
    frame = load(DataConfig(path=str(shared / "data/preference/pandalm_human_testset.json.gz"))).frame
    split = split_by_prompt(frame, 0.1, 0)
    sides = [set(split.loc[split["split"] == side, "prompt"]) - {""} for side in ("train", "eval")]
    assert not sides[0] & sides[1]
    assert 0.03 < len(sides[1]) / len(sides[0] | sides[1]) < 0.2


def test_given_eval_frame_reports_prompts_on_both_sides() -> None:
    joined, leaked = with_eval_frame(frame_of(["a", "b", "b"]), frame_of(["B ", "c", "b"]))
    assert leaked == ["B "]
    assert list(joined["split"]) == ["train"] * 3 + ["eval"] * 3
    assert with_eval_frame(frame_of(["a"]), frame_of(["c"]))[1] == []
    faulty = to_frame([PairFields("", False, "", "", fault="x")])
    assert with_eval_frame(faulty, faulty)[1] == []
