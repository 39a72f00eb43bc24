"""An lm-eval model: its Hugging Face class, with multiple choice scored by our log-prob engine.

Tokenisation, chat template, truncation and generation are lm-eval's. The engine reads a prompt once for
several answers, and scores an answer of several tasks once; lm-eval reads every answer with its prompt.
"""

from itertools import groupby
from typing import Any

from lm_eval.models.huggingface import HFLM

from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.errors import ModelError, StageFailed
from dpo_core.evaluation.model_under_test import ModelUnderTest
from dpo_core.model_check import check_definition
from dpo_core.models.source import check_context
from dpo_core.scoring.autocast import effective_precision
from dpo_core.scoring.completion_scores import completion_scores
from dpo_core.scoring.precision import Precision


class HarnessLM(HFLM):
    """The lm-eval model of a subject.

    Args:
        token_budget: tokens in one forward pass that scores answers.
        batch_size: prompts answered at once.
    """

    def __init__(
        self,
        subject: ModelUnderTest,
        *,
        precision: Precision = "fp32",
        token_budget: int = 2048,
        batch_size: int = 8,
    ) -> None:
        half = effective_precision(precision, subject.model.device) == "bf16"
        super().__init__(
            pretrained=subject.model,
            tokenizer=subject.tokenizer,
            batch_size=batch_size,
            mixed_precision_dtype="bfloat16" if half else None,
            softmax_dtype="float32",
        )
        self.precision, self.token_budget, self.ranks = precision, token_budget, subject.ranks
        self.cut = 0
        """Number of requests whose prompt was cut from the left to fit the model's context."""

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-prob of each continuation of its context, as text; without the library's progress bar."""
        scored: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scored

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Summed log-prob of each continuation; whether it is greedy is not checked, and always False."""
        # As in HFLM: the last token is not fed, so one token more than the context can be scored.
        room = self.max_length + 1
        self.cut += sum(len(context) + len(answer) > room for _, context, answer in requests)
        sequences = [_sequence(context, answer, room) for _, context, answer in requests]
        distinct = list(dict.fromkeys(sequences))
        check_context(self.model.config, max(map(len, distinct)) - 1)
        try:
            check_definition(self.model)
        except ModelError:  # its logits are more than trunk and head: use its own forward
            score = super()._loglikelihood_tokens
            (logps,) = self.ranks.map(
                "scores",
                [len(requests)],
                lambda _: [logp for logp, _ in score(requests, disable_tqdm=True)],
            )
            return [(logp, False) for logp in logps]
        scores = completion_scores(self.model, distinct, self.precision, self.token_budget, ranks=self.ranks)
        sums = {key: float(score.logps.double().sum()) for key, score in zip(distinct, scores, strict=True)}
        return [(sums[sequence], False) for sequence in sequences]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """lm-eval's answers.

        Raises:
            StageFailed: an answer can be longer than the context.
        """
        longest = max(request.args[1].get("max_gen_toks", self.max_gen_toks) for request in requests)
        room = self.max_length - longest
        if room < 1:
            raise StageFailed(
                f"answers of up to {longest} tokens do not fit into the context of {self.max_length} tokens",
                "Lower sampling.max_new_tokens",
            )
        self.cut += sum(len(self.tok_encode(request.args[0])) > room for request in requests)
        batches, answer = self._batches(requests), super().generate_until
        answers = self.ranks.map(
            "answers",
            batches,
            lambda batch: answer([requests[i] for i in batch], disable_tqdm=True),
            [len(batch) for batch in batches],
        )
        by_index = {
            i: text
            for batch, texts in zip(batches, answers, strict=True)
            for i, text in zip(batch, texts, strict=True)
        }
        return [by_index[i] for i in range(len(requests))]

    def _batches(self, requests: list[Any]) -> list[list[int]]:
        """Indices of requests in the batches of HFLM: padding affects the last digits."""

        def order_key(index: int) -> tuple[str, int, str]:
            text, settings = requests[index].args
            return repr(settings), -len(self.tok_encode(text)), text

        order = sorted(range(len(requests)), key=order_key)
        batches = []
        for _, group in groupby(order, key=lambda index: repr(requests[index].args[1])):
            indices = list(group)
            batches += [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        return batches


def _sequence(context: list[int], answer: list[int], room: int) -> TokenSequence:
    prompt = context[max(len(context) + len(answer) - room, 0) :]
    return TokenSequence(tuple(prompt), tuple(answer))
