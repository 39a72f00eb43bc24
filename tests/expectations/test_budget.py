"""The token rules against tokenising everything, the estimate, and the template of a chat."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dpo_core.data.config import DataConfig
from dpo_core.data.load import load
from dpo_core.data.split import split_by_prompt
from dpo_core.data.tokens.config import TokenConfig
from dpo_core.data.tokens.tokenise import Tokenise
from expectations.config import GateConfig
from expectations.features import Tokenisation, compute
from expectations.report import GateReport
from expectations.token_rules import _judge_row, token_flags
from tests.support.frames import PlainTokens, clean_pairs, failed

Gate = Callable[..., tuple[GateReport, pd.DataFrame]]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """A byte-level BPE with many merges, so that tokens are far fewer than bytes."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    frame = clean_pairs(400)
    texts = [*frame["chosen"], *frame["rejected"], *frame["prompt"]]
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return made


def random_pairs(rows: int, seed: int) -> pd.DataFrame:
    """Pairs of very different lengths, half of them with a long common start."""
    rng = random.Random(seed)
    words = ["there", "is a lot", "to say", "é", "你好", "number", "town", "🙂", "\n", "x" * 30]

    def text(most: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(1, most)))

    frame = clean_pairs(rows)
    frame["prompt"] = [f"{i} {text(40)}" for i in range(rows)]
    starts = [text(60) if rng.random() < 0.5 else "" for _ in range(rows)]
    for side in ("chosen", "rejected"):
        frame[side] = [start + text(20) for start in starts]
        frame[f"{side}_ended"] = [rng.random() < 0.5 for _ in range(rows)]
    return frame


@pytest.mark.parametrize("budget", [(64, 32), (64, None), (160, 20), (24, 23)])
def test_bytes_decide_as_tokens_would(bpe: Tokenizer, budget: tuple[int, int | None]) -> None:
    frame = random_pairs(600, seed=1)
    known = Tokenisation(PlainTokens(lambda text: bpe.encode(text).ids), *budget)
    features = compute(frame, "pairs", tokenisation=known)
    columns, estimated = token_flags(frame, features, known, "pairs", max_candidates=10**6, seed=0)
    assert not estimated
    rows = frame.to_dict("records")
    expected = np.array([_judge_row(row, known, "pairs") for row in rows])
    # Pairs that are equal or empty before any truncation have rules of their own.
    expected[:, 1] &= ~features.flags[["identical", "empty_chosen", "empty_rejected"]].any(axis=1).to_numpy()
    assert (columns["over_long"] == expected[:, 0]).all()
    assert (columns["identical_after_truncation"] == expected[:, 1]).all()
    assert 0 < expected[:, 0].sum() < 600 or budget == (24, 23)
    assert expected[:, 1].sum() > 0
    assert features.maybe_equal.sum() < 600


def test_the_gate_agrees_with_training(gate: Gate, shared: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(shared / "models" / "stories260K" / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
    )
    tokens = Tokenise(tokenizer, TokenConfig(template="transcript", max_length=48, max_prompt_length=40))
    file = shared / "data" / "preference" / "hh_harmless_base_test.jsonl.gz"
    frame = load(DataConfig(path=str(file), limit=400)).frame
    frame = frame[(frame["fault"] == "") & (frame["chosen"] != "") & (frame["rejected"] != "")]
    frame = split_by_prompt(frame, eval_fraction=0.1, seed=0)
    report, _ = gate(frame, tokens=tokens, max_length=48, max_prompt_length=40)
    equal = [
        row["row"] for row in frame.to_dict("records") if tokens.pair(row) == "identical_after_truncation"
    ]
    found = failed(report)["identical_after_truncation"]
    assert equal
    assert found.count == len(equal)
    assert found.rows == equal[:10]


def test_many_candidates_are_estimated(gate: Gate) -> None:
    frame = clean_pairs(6000)
    over = np.random.default_rng(3).random(6000) < 0.3
    frame.loc[over, "rejected"] += " It is far." * 20
    config = GateConfig.model_validate({"max_candidates": 1000, "over_long": {"max_rate": 0.2}})
    # One token a word: every row may be over the budget by its bytes, three in ten are.
    tokens = PlainTokens(lambda text: [len(w) for w in text.split()])
    report, _ = gate(frame, config=config, tokens=tokens, max_length=50, max_prompt_length=30)
    found = failed(report)["over_long"]
    assert found.rate == pytest.approx(0.3, abs=0.05)
    assert found.rate == pytest.approx(float(over.mean()), abs=0.05)
    assert "estimated from" in found.message
    seen = set(frame.loc[over, "row"])
    assert set(found.rows) <= seen


def test_without_tokens_the_rules_are_skipped(gate: Gate) -> None:
    def skipped(**options: Any) -> set[str]:
        findings = gate(clean_pairs(), **options)[0].findings
        return {f.rule for f in findings if f.skipped and "drift" not in f.rule}

    both = {"pairs/over_long", "pairs/identical_after_truncation"}
    own = {"pairs/special_tokens"}
    tokens = PlainTokens(lambda text: [0] * len(text))
    assert skipped(tokens=tokens) == both | own
    assert skipped(special_tokens=["</s>"], max_length=10) == both
    assert skipped(tokens=tokens, max_length=1000) == own
