"""Preference suites: agreement with human preferences, its calibration, and its length bias.

An answer y to a prompt x has two scores:
- its implicit reward, β·log(π(y|x)/π_ref(y|x)) (Rafailov et al. 2023, eq. 5), if there is a reference;
- its likelihood, log π(y|x), and the same per token, for a model without a reference.
In bf16 a summed log-prob has an error of some hundredths of a nat, which can change the order of pairs with
almost equal scores; `precision: fp32` takes twice the time.

Data: HH, HHH alignment, LLMBar (five parts), PandaLM. A pair that people judged equal counts as half right.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import JsonValue

from dpo_core.data.files.read import read_rows
from dpo_core.data.formats import ADAPTERS
from dpo_core.data.layouts.common import ASSISTANT
from dpo_core.data.layouts.fields import Fault, PairFields, Row
from dpo_core.data.layouts.messages import chat_prompt
from dpo_core.data.tokens.sequences import TokenPair
from dpo_core.errors import StageFailed
from dpo_core.evaluation.config import SuiteConfig
from dpo_core.evaluation.results import Better, Item, Measure, MeasureSpec, Outcome
from dpo_core.evaluation.suites.base import Suite
from dpo_core.evaluation.suites.chat_or_text import wants_chat
from dpo_core.evaluation.suites.rows import sample_prompts
from dpo_core.rewards.quality import BINS, best_temperature, calibration_error, spearman
from dpo_core.statistics.estimates import Estimate, Floats, bootstrap_statistic
from dpo_core.system import digest_text

if TYPE_CHECKING:
    from dpo_core.evaluation.model_under_test import ModelUnderTest

LIKELIHOOD = (
    MeasureSpec(name="likelihood_accuracy", label="Likelihood accuracy"),
    MeasureSpec(name="likelihood_accuracy_per_token", label="Likelihood accuracy, per token"),
)
IMPLICIT = (
    MeasureSpec(name="accuracy", label="Accuracy of the implicit reward"),
    MeasureSpec(name="accuracy_decided", label="Accuracy, ties of people left out"),
    MeasureSpec(name="accuracy_better_shorter", label="Accuracy where the better answer is the shorter"),
    MeasureSpec(name="margin", label="Margin", better="neither", kind="mean", unit="nats"),
    MeasureSpec(
        name="margin_per_token", label="Margin per token", better="neither", kind="mean", unit="nats"
    ),
    MeasureSpec(name="brier", label="Brier score", better="lower", kind="mean"),
    MeasureSpec(name="nll", label="NLL", better="lower", kind="mean", unit="nats"),
)
ECE_PAIRS = 10 * BINS
"""With fewer than ten pairs per bin a calibration error is mostly noise: with one pair it is at least 0.5."""
DATA = (MeasureSpec(name="better_longer", label="Better answer is the longer", better="neither"),)


class Labelled(NamedTuple):
    """A pair with its human label; the two answers of a tie have the order of the file."""

    id: str
    pair: PairFields
    subset: str = ""
    tied: bool = False


class ScoredPair(NamedTuple):
    """A usable pair with the summed log-probs of both answers, chosen and rejected."""

    labelled: Labelled
    tokens: TokenPair
    policy: tuple[float, float]
    reference: tuple[float, float] | None


def run(subject: "ModelUnderTest", rows: list[Row], config: SuiteConfig) -> Outcome:
    """Score every pair under the subject, and under its reference if there is one.

    Raises:
        StageFailed: no pair can be used.
    """
    usable = [row["labelled"] for row in rows if "labelled" in row]
    labelled = sample_prompts(usable, _prompt_of, config.limit, config.seed)
    chat = wants_chat(subject, config)
    pairs: list[tuple[Labelled, TokenPair]] = []
    left_out = Counter(row["fault"] for row in rows if "fault" in row)
    for row in labelled:
        tokens = subject.tokenise.pair({**_canonical(row.pair, chat), "id": row.id})
        if isinstance(tokens, str):
            left_out[tokens] += 1
        else:
            pairs.append((row, tokens))
    if not pairs:
        reasons = "; ".join(f"{count} rows: {reason}" for reason, count in left_out.items())
        raise StageFailed(
            f"none of the pairs can be scored ({reasons or 'the file has none'})",
            "Raise tokens.max_length if they are too long; else correct the rows of the suite's file",
        )
    scored = list(_scored(subject, pairs, config))
    specs = [*(IMPLICIT if subject.reference else ()), *LIKELIHOOD, *DATA]
    items = [_item(pair, config.beta) for pair in scored]
    used = {name for item in items for name in item.values}
    if not any(pair.labelled.tied for pair in scored):
        used -= {"accuracy_decided"}  # equal to the accuracy
    facts: dict[str, JsonValue] = {"pairs": len(items), "left_out": dict(left_out)}
    others: list[Measure] = []
    if subject.reference:
        subsets = sorted({pair.labelled.subset for pair in scored})
        for subset in ["", *(subsets if len(subsets) > 1 else [])]:
            own = [pair for pair in scored if subset in ("", pair.labelled.subset)]
            others += _calibration(own, config, subset)
    return Outcome(
        items=items,
        specs=[spec for spec in specs if spec.name in used],
        others=others,
        facts=facts,
        settings={
            "precision": config.precision,
            "beta": config.beta,
            "reference": subject.reference.weights if subject.reference else None,
            "chat_template": chat,
        },
    )


def _scored(
    subject: "ModelUnderTest", pairs: Sequence[tuple[Labelled, TokenPair]], config: SuiteConfig
) -> Iterator[ScoredPair]:
    sides = [side for _, tokens in pairs for side in (tokens.chosen, tokens.rejected)]
    sums = subject.sums(sides, config.precision, config.token_budget)
    ref_sums = None
    if subject.reference:
        same = subject.reference.weights == subject.weights
        ref_sums = sums if same else subject.reference_sums(sides, config.precision, config.token_budget)
    for i, (labelled, tokens) in enumerate(pairs):
        reference = None if ref_sums is None else (ref_sums[2 * i], ref_sums[2 * i + 1])
        yield ScoredPair(labelled, tokens, (sums[2 * i], sums[2 * i + 1]), reference)


def _item(scored: ScoredPair, beta: float) -> Item:
    row, tokens = scored.labelled, scored.tokens
    better, worse = scored.policy
    length_w, length_l = tokens.chosen.targets, tokens.rejected.targets

    def right(gap: float) -> float:
        # Equal scores are right half of the time.
        return 0.5 if row.tied or gap == 0 else float(gap > 0)

    values = {
        "likelihood_accuracy": right(better - worse),
        "likelihood_accuracy_per_token": right(better / length_w - worse / length_l),
    }
    if not row.tied:
        values["better_longer"] = 0.5 if length_w == length_l else float(length_w > length_l)
    if scored.reference is not None:
        gain_w, gain_l = better - scored.reference[0], worse - scored.reference[1]
        gap = gain_w - gain_l
        values["accuracy"] = right(gap)
        if not row.tied:
            values["accuracy_decided"] = right(gap)
            values["margin"] = gap
            values["margin_per_token"] = gain_w / length_w - gain_l / length_l
            values["brier"] = float((1 - 1 / (1 + np.exp(-beta * gap))) ** 2)
            values["nll"] = float(np.logaddexp(0, -beta * gap))
            if length_w < length_l:
                values["accuracy_better_shorter"] = right(gap)
    return Item(id=row.id, cluster=_prompt_of(row), subset=row.subset, prompt=row.pair.prompt, values=values)


def _calibration(scored: Sequence[ScoredPair], config: SuiteConfig, subset: str) -> list[Measure]:
    """Calibration and length bias of the implicit reward over the pairs that are not ties."""
    decided = [s for s in scored if s.reference is not None and not s.labelled.tied]
    clusters = [_prompt_of(s.labelled) for s in decided]
    if len(set(clusters)) < 2:
        return []
    rewards = np.array([[p - r for p, r in zip(s.policy, s.reference or (), strict=True)] for s in decided])
    gap_N = config.beta * (rewards[:, 0] - rewards[:, 1])
    lengths = [(s.tokens.chosen.targets, s.tokens.rejected.targets) for s in decided]
    longer_N = np.array([w - l for w, l in lengths], np.float64)  # noqa: E741
    # In a random order "A is better" is not always true, so that a tie is right half of the time.
    first_N = np.random.default_rng(config.seed).random(len(gap_N)) < 0.5
    p_N = 1 / (1 + np.exp(-np.where(first_N, gap_N, -gap_N)))

    def both_orders(gaps_N: Floats, lengths_N: Floats) -> float | None:
        return spearman(np.concatenate([gaps_N, -gaps_N]), np.concatenate([lengths_N, -lengths_N]))

    seed = config.seed
    ece = None
    if len(decided) >= ECE_PAIRS:
        arrays = p_N, first_N
        raw = bootstrap_statistic(calibration_error, arrays, clusters, interval="basic", seed=seed)
        # The correction for noise can push both ends below 0.
        ece = raw and raw.model_copy(update={"low": max(raw.low, 0.0), "high": max(raw.high, 0.0)})
    measures: list[tuple[str, str, Better, Estimate | None]] = [
        ("ece", "Calibration error (ECE)", "lower", ece),
        ("temperature", "Best temperature", "neither",
         bootstrap_statistic(best_temperature, (gap_N,), clusters, seed=seed)),
        ("length_spearman", "Spearman of reward gap and length gap", "neither",
         bootstrap_statistic(both_orders, (gap_N, longer_N), clusters, seed=seed)),
    ]  # fmt: skip
    return [
        Measure(
            name=name,
            label=label,
            better=better,
            kind="mean",
            paired=False,
            subset=subset,
            estimate=estimate,
        )
        for name, label, better, estimate in measures
        if estimate is not None
    ]


def _canonical(pair: PairFields, chat: bool) -> dict[str, Any]:
    """The pair as a canonical row: an instruction becomes a user's turn, a transcript is unchanged."""
    if chat and not pair.chat and not pair.prompt.endswith(ASSISTANT):
        turn = chat_prompt([{"role": "user", "content": pair.prompt}])
        return {**pair._asdict(), "prompt": turn, "chat": True}
    return pair._asdict()


def _prompt_of(row: Labelled) -> str:
    return digest_text(row.pair.prompt)[:16]


# --- data -------------------------------------------------------------------------------------------------

Convert = Callable[[Row], Labelled]


def _read(path: Path, convert: Convert, mark: str = "") -> list[Row]:
    """Every row of a file as `{"labelled": …}`, or as `{"fault": reason}` if it cannot be used."""
    rows: list[Row] = []
    for first, chunk in read_rows(str(path)):
        for number, row in enumerate(chunk, first):
            try:
                rows.append({"labelled": convert(row)._replace(id=f"{mark}{number}")})
            except Fault as fault:
                rows.append({"fault": str(fault)})
    return rows


def _hh(row: Row) -> Labelled:
    pair = ADAPTERS["hh"].convert(row)
    assert isinstance(pair, PairFields)
    if not pair.chosen.strip() or not pair.rejected.strip():
        raise Fault("an answer is empty")
    return Labelled("", pair)


def _hhh(row: Row) -> Labelled:
    pair = ADAPTERS["prompt-pairs"].convert(row)
    assert isinstance(pair, PairFields)
    return Labelled("", pair, str(row.get("subset", "")))


def _pandalm(row: Row) -> Labelled:
    pair = ADAPTERS["pandalm"].convert(row)  # the majority decides
    tied = pair is None
    if pair is None:
        sides = row.get("response1"), row.get("response2")
        if not all(isinstance(side, str) for side in sides):
            raise Fault("a response is not a string")
        prompt = ADAPTERS["pandalm"].convert({**row, "annotator1": 1, "annotator2": 1, "annotator3": 1})
        assert isinstance(prompt, PairFields)
        pair = prompt
    assert isinstance(pair, PairFields)
    if not pair.chosen.strip() or not pair.rejected.strip():
        raise Fault("an answer is empty")
    return Labelled("", pair, "", tied)


def _llmbar(row: Row) -> Labelled:
    label = row.get("label")
    texts = [row.get(name) for name in ("input", "output_1", "output_2")]
    if label not in (1, 2) or not all(isinstance(text, str) for text in texts):
        raise Fault("input, output_1, output_2 and a label of 1 or 2 are expected")
    prompt, first, second = map(str, texts)
    chosen, rejected = (first, second) if label == 1 else (second, first)
    return Labelled("", PairFields(prompt, False, chosen, rejected))


def _read_llmbar(path: Path) -> list[Row]:
    """The rows of all parts next to the first one; each part is a subset."""
    rows: list[Row] = []
    for file in [path, *_llmbar_parts(path)]:
        part = file.name.removeprefix("llmbar_").partition(".")[0]
        for row in _read(file, _llmbar, f"{part}-"):
            if "labelled" in row:
                row["labelled"] = row["labelled"]._replace(subset=part)
            rows.append(row)
    return rows


def _llmbar_parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob("llmbar_adv_*.json*"))


SUITES = (
    Suite(
        "hh", "HH harmlessness", "Human preferences, harmlessness (test set of 2,312 pairs)",
        ("hh_harmless_base_test.jsonl.gz", "hh_harmless_base_test.jsonl", "test.jsonl.gz"),
        "anthropics/hh-rlhf, harmless-base/test.jsonl.gz (MIT)", run, lambda path: _read(path, _hh),
    ),
    Suite(
        "hhh", "HHH alignment", "221 pairs: helpful, honest, harmless, other",
        ("hhh_alignment.jsonl.gz", "hhh_alignment.jsonl"),
        "BIG-bench hhh_alignment (Apache-2.0) as rows of subset, prompt, chosen, rejected",
        run, lambda path: _read(path, _hhh),
    ),
    Suite(
        "llmbar", "LLMBar", "419 pairs, of which 319 try to mislead (five parts)",
        ("llmbar_natural.json.gz", "llmbar_natural.json"),
        "princeton-nlp/LLMBar, Dataset/LLMBar (MIT), as llmbar_natural.json, llmbar_adv_manual.json, …",
        run, _read_llmbar, _llmbar_parts,
    ),
    Suite(
        "pandalm", "PandaLM", "Human preferences, three annotators, ties count half",
        ("pandalm_human_testset.json.gz", "pandalm_human_testset.json", "testset-v1.json"),
        "WeOpenML/PandaLM, data/testset-v1.json (Apache-2.0)", run, lambda path: _read(path, _pandalm),
    ),
)  # fmt: skip
