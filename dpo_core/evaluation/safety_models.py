"""Loads safety classifiers; `safety_classifier` describes the kinds."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from dpo_core.data.tokens.config import TokenConfig
from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.errors import ModelError, RecipeError
from dpo_core.evaluation.prompt import as_prompt
from dpo_core.evaluation.safety_classifier import Classifier, Judge, identity
from dpo_core.models.load import load_tokenizer
from dpo_core.models.reward_model import RewardModel
from dpo_core.models.transformers_lock import quiet_transformers
from dpo_core.ranks import Ranks, SingleRank
from dpo_core.rewards.functions import RewardFunction, is_reward_model, load_reward
from dpo_core.rewards.http import is_url
from dpo_core.rewards.model import score
from dpo_core.scoring.completion_scores import length_batches

_TOKENS_IN_A_PASS = 4096
_SAFE = {"safe", "harmless", "benign", "non toxic", "nontoxic", "not toxic", "acceptable", "not harmful"}
_UNSAFE = {"unsafe", "harmful", "toxic", "not safe", "malicious", "unacceptable", "not harmless", "hate"}
_FORMS = (
    "Name the folder of a sequence classifier or of a trained reward model, 'package.module:callable', "
    "'path/to/file.py:callable' or 'http(s)://host:port/path'"
)


def load_classifier(
    spec: str,
    safe_label: str | None = None,
    tokens: TokenConfig | None = None,
    *,
    device: Any = "cpu",
    ranks: Ranks | None = None,
) -> Classifier:
    """The classifier that a configuration names.

    Args:
        safe_label: the class that means safe, if a sequence classifier's labels do not tell.
        tokens: the tokenisation of a reward model.
        device: of a model.
        ranks: share the batches of a model; all are called with the same answers. Other classifiers get all
            answers at once, on one rank.

    Raises:
        RecipeError: there is no usable classifier of that name, or its labels do not tell which is safe.
        ModelError: the checkpoint is damaged, or has no trained head.
    """
    ranks = ranks or SingleRank()
    if is_reward_model(spec):
        judge = _reward_model(Path(spec), tokens or TokenConfig(), device, ranks)
    elif Path(spec).is_dir():
        judge = _sequence_classifier(Path(spec), safe_label, device, ranks)
    elif is_url(spec) or ":" in spec:
        judge = _callable(load_reward(spec), ranks)
    else:
        raise RecipeError(f"the classifier '{spec}' has none of the known forms", _FORMS)
    return Classifier(spec, identity(spec), judge)


def safe_class(labels: Sequence[str], safe_label: str | None) -> int:
    """Which of two or more labels means safe.

    Raises:
        RecipeError: `safe_label` is not one of them, or is None and the labels do not tell.
    """
    plain = [_normalised(label) for label in labels]
    if safe_label is not None:
        if _normalised(safe_label) not in plain:
            raise RecipeError(
                f"the classifier has no label '{safe_label}'",
                f"Set settings.safe_label to one of {', '.join(labels)}",
            )
        return plain.index(_normalised(safe_label))
    safe = [i for i, label in enumerate(plain) if label in _SAFE]
    if not safe and len(plain) == 2:  # of two labels the one that is not unsafe
        unsafe = [i for i, label in enumerate(plain) if label in _UNSAFE]
        safe = [1 - unsafe[0]] if len(unsafe) == 1 else []
    if len(safe) != 1:
        raise RecipeError(
            f"the classifier's labels do not tell which one means safe: {', '.join(labels)}",
            "Set settings.safe_label to that label",
        )
    return safe[0]


def _normalised(label: str) -> str:
    return re.sub(r"[\s_-]+", " ", label).strip().casefold()


def _callable(reward: RewardFunction, ranks: Ranks) -> Judge:
    def p_safe(prompts: list[str], answers: list[str]) -> list[float]:
        p: list[float]
        (p,) = ranks.map("safety", [len(answers)], lambda _: reward(prompts, answers))
        return p

    return p_safe


def _sequence_classifier(folder: Path, safe_label: str | None, device: Any, ranks: Ranks) -> Judge:
    model, tokenizer = _load_sequence_classifier(folder)
    model.to(device)
    settings: Any = model.config
    labels = [settings.id2label[i] for i in range(settings.num_labels)]
    chosen = safe_class(labels, safe_label) if len(labels) > 1 else 0
    unsafe_logit = len(labels) == 1 and _normalised(labels[0]) in _UNSAFE  # a single logit, for unsafe
    independent = len(labels) == 1 or settings.problem_type == "multi_label_classification"

    @torch.no_grad()
    def of_batch(rows: list[dict[str, Any]]) -> list[float]:
        batch = tokenizer.pad(rows, return_tensors="pt")
        logits_BC = model(**batch.to(model.device)).logits.float()
        p_BC = logits_BC.sigmoid() if independent else functional.softmax(logits_BC, -1)
        return [1 - p if unsafe_logit else p for p in p_BC[:, chosen].tolist()]

    def p_safe(prompts: list[str], answers: list[str]) -> list[float]:
        rows = _encode(tokenizer, prompts, answers, settings)
        groups = length_batches([len(row["input_ids"]) for row in rows], _TOKENS_IN_A_PASS)
        judged = ranks.map("safety", groups, lambda group: of_batch([rows[i] for i in group]))
        by_row = {
            i: p for group, part in zip(groups, judged, strict=True) for i, p in zip(group, part, strict=True)
        }
        return [by_row[i] for i in range(len(rows))]

    return p_safe


def _load_sequence_classifier(folder: Path) -> tuple[Any, Any]:
    tokenizer: Any = _load_tokenizer(folder)
    try:
        with quiet_transformers():
            from transformers import AutoModelForSequenceClassification  # noqa: PLC0415 - see transformers_lock

            model, info = AutoModelForSequenceClassification.from_pretrained(
                str(folder),
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:
        raise ModelError(
            f"the classifier in {folder} cannot be loaded: {str(error).strip().splitlines()[0][:300]}", _FORMS
        ) from error
    missing = sorted(info.get("missing_keys", ())) + sorted(map(str, info.get("mismatched_keys", ())))
    if missing:
        # transformers would initialise them at random: a language model would pass as a classifier.
        raise ModelError(f"{folder} is not a trained classifier: its weights lack {missing[0]}", _FORMS)
    if model.config.pad_token_id is None:  # needed to find the end of each text in a batch
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def _load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a classifier's folder, which needs a padding token but no end of sequence.

    Raises:
        ModelError: there is none, or it has no padding token.
    """
    try:
        with quiet_transformers():
            from transformers import AutoTokenizer  # noqa: PLC0415 - see transformers_lock

            tokenizer: Any = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        raise ModelError(
            f"the tokenizer of the classifier in {folder} cannot be loaded: {type(error).__name__}",
            "Put its tokenizer files next to its weights",
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"the tokenizer in {folder} has no padding token", "Set its pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _encode(tokenizer: Any, prompts: list[str], answers: list[str], settings: Any) -> list[dict[str, Any]]:
    """Each prompt with its answer: as a conversation if there is a chat template, else as a text pair."""
    # Two positions less, for models that count positions from 2.
    context = getattr(settings, "max_position_embeddings", math.inf) - 2
    longest = int(min(tokenizer.model_max_length, context, 1_000_000))
    if not tokenizer.chat_template:
        return [
            dict(tokenizer(prompt, answer, truncation=True, max_length=longest))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        rows.append(dict(tokenizer(text, add_special_tokens=False, truncation=True, max_length=longest)))
    return rows


def _reward_model(folder: Path, tokens: TokenConfig, device: Any, ranks: Ranks) -> Judge:
    model, tokenizer = RewardModel.load(folder).to(device), load_tokenizer(folder)
    tokenise = Tokenise(tokenizer, tokens)

    def sequence(prompt: str, answer: str) -> TokenSequence:
        question = as_prompt(prompt, chat=bool(tokenizer.chat_template))
        # With an end token: the model was trained on complete answers, and an empty one must have a token.
        return tokenise.scored(question.prompt, question.chat, answer)

    def p_safe(prompts: list[str], answers: list[str]) -> list[float]:
        rows = [sequence(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        return [1 / (1 + math.exp(-reward)) for reward in score(model, rows, "fp32", ranks=ranks)]

    return p_safe
