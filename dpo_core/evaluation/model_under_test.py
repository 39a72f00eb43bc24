"""The model that a suite asks: a checkpoint with its tokenizer, loaded once for all suites."""

import datetime
import tempfile
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_core.data.tokens.chat_template import template_in
from dpo_core.data.tokens.config import settled
from dpo_core.data.tokens.tokenise import Sequence, TokenConfig, Tokenise
from dpo_core.errors import ModelError
from dpo_core.evaluation.asked import Asked
from dpo_core.evaluation.safety_classifier import Classifier
from dpo_core.evaluation.safety_models import load_classifier
from dpo_core.generation.config import SamplingConfig
from dpo_core.generation.generate import sample
from dpo_core.model_check import check_definition
from dpo_core.models.load import config_in, load_model, load_tokenizer
from dpo_core.models.source import check_context, weights_digest
from dpo_core.ranks import Alone, Ranks
from dpo_core.reference.keys import sequence_key
from dpo_core.reference.logps import Reference, Resources, reference_logps
from dpo_core.scoring.logprobs import completion_scores
from dpo_core.scoring.precision import Precision
from dpo_core.statistics.estimates import Floats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Subject:
    """A model under evaluation.

    Args:
        path: a checkpoint folder as `dpo_core.models.load.convert` leaves it.
        name: as the user named it, for tables.
        reference: what it was trained from, for implicit rewards.
        caches: folder of the reference log-probs that are already known.
        device: where the model computes.
        ranks: share what is computed; all ask the same in the same order. With more than one, `caches` is
            where all of them see it.
    """

    path: Path
    name: str
    tokens: TokenConfig = field(default_factory=TokenConfig)
    reference: "Subject | None" = None
    caches: Path | None = None
    device: Any = "cpu"
    ranks: Ranks = field(default_factory=Alone)

    def __post_init__(self) -> None:
        # One day for all that is asked, and in the key of what is kept.
        self.tokens = settled(self.tokens, template_in(self.path), datetime.date.today())

    @cached_property
    def model(self) -> Any:
        """The fp32 model in eval mode, read on first use."""
        return load_model(self.path).to(self.device)

    @cached_property
    def scored(self) -> Any:
        """The same model, known to give its own log-probs from its trunk and head.

        Raises:
            ModelError: it does not, or it is no causal language model.
        """
        check_definition(self.model)
        return self.model

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return load_tokenizer(self.path)

    @cached_property
    def tokenise(self) -> Tokenise:
        return Tokenise(self.tokenizer, self.tokens)

    @cached_property
    def weights(self) -> str:
        """sha256 of the weights; one rank reads them for all."""
        (digest,) = self.ranks.map("weights", [str(self.path)], lambda path: weights_digest(Path(path)))
        return str(digest)

    def answers(
        self,
        asked: Seq[Asked],
        sampling: SamplingConfig,
        *,
        seed: int,
    ) -> list[str]:
        """One sampled answer a prompt, as text without special tokens; repeat a prompt to get more.

        A prompt is cut where it leaves no room for the answer within `tokens.max_length`.
        """
        room = sampling.max_new_tokens
        prompts = [self.tokenise.prompt_of(one._asdict(), room) for one in asked]
        if () in prompts:
            raise ModelError(
                f"a prompt's frame alone exceeds {self.tokens.max_prompt_length} tokens",
                "Raise tokens.max_prompt_length",
            )
        self.check_length(max(map(len, prompts), default=0) + room)
        stops = self.tokenise.stop_ids
        drawn = sample(self.scored, prompts, sampling, eos_id=stops, seed=seed, ranks=self.ranks)
        return [self.tokenise.text(c.ids, ids) for c, ids in zip(drawn, prompts, strict=True)]

    def check_length(self, longest: int) -> None:
        """Refuse rows of more tokens than the model, or its reference, has positions for."""
        for subject in (self, self.reference) if self.reference else (self,):
            check_context(config_in(subject.path), longest)

    def sums(self, sequences: Seq[Sequence], precision: Precision, token_budget: int) -> Floats:
        """Summed log-prob of each sequence's completion."""
        self.check_length(max(map(len, sequences), default=0))
        scores = completion_scores(self.scored, sequences, precision, token_budget, ranks=self.ranks)
        return np.array([float(one.logps.double().sum()) for one in scores])

    def classifier(self, spec: str, safe_label: str | None) -> Classifier:
        """What judges whether its answers are safe; see `load_classifier`."""
        return load_classifier(spec, safe_label, self.tokens, device=self.device, ranks=self.ranks)

    def reference_sums(self, sequences: Seq[Sequence], precision: Precision, token_budget: int) -> Floats:
        """Summed log-prob of each sequence's completion under the reference, which there must be.

        What the cache knows is not computed again.
        """
        assert self.reference is not None
        with tempfile.TemporaryDirectory() as scratch:
            own = self.reference
            reference = Reference(own.path, own.weights, precision, described=own.name)
            caches = self.caches or Path(scratch) / "caches"
            resources = Resources(caches, token_budget, self.device)
            known = reference_logps(sequences, reference, resources, self.ranks)
            return known.shard.sums([sequence_key(s) for s in sequences])
