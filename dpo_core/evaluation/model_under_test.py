"""The model under evaluation: a checkpoint with its tokenizer, loaded once for all suites."""

import datetime
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_core.data.tokens.chat_template import template_in
from dpo_core.data.tokens.config import TokenConfig, with_date
from dpo_core.data.tokens.sequences import TokenSequence
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.errors import ModelError, RecipeError
from dpo_core.evaluation.prompt import Prompt
from dpo_core.evaluation.safety_classifier import Classifier
from dpo_core.evaluation.safety_models import load_classifier
from dpo_core.evaluation.suite_names import OF_DENOISERS
from dpo_core.generation.config import SamplingConfig
from dpo_core.generation.generate import sample
from dpo_core.model_check import check_definition
from dpo_core.models.folder import is_denoiser
from dpo_core.models.load import config_in, load_model, load_tokenizer
from dpo_core.models.source import check_context, weights_digest
from dpo_core.ranks import Ranks, SingleRank
from dpo_core.reference.keys import sequence_key
from dpo_core.reference.logps import CacheSettings, Reference, reference_logps
from dpo_core.scoring.completion_scores import completion_scores
from dpo_core.scoring.precision import Precision
from dpo_core.statistics.estimates import Floats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dpo_core.models.denoiser import Denoiser


@dataclass
class ModelUnderTest:
    """A model under evaluation.

    Args:
        path: a checkpoint folder as `dpo_core.models.load.convert` writes it.
        name: the user's name for it, for tables.
        reference: the model that it was trained from, for implicit rewards.
        caches: folder of cached reference log-probs.
        device: of the model.
        ranks: share the computation; all make the same calls in the same order. With several ranks,
            `caches` must be on a shared disk.
    """

    path: Path
    name: str
    tokens: TokenConfig = field(default_factory=TokenConfig)
    reference: "ModelUnderTest | None" = None
    caches: Path | None = None
    device: Any = "cpu"
    ranks: Ranks = field(default_factory=SingleRank)

    def __post_init__(self) -> None:
        # The date in a template is fixed once: it is part of cache keys.
        self.tokens = with_date(self.tokens, template_in(self.path), datetime.date.today())

    @cached_property
    def model(self) -> Any:
        """The fp32 model in eval mode, loaded on first use."""
        _ = self.tokenizer  # refuses a diffusion model
        return load_model(self.path).to(self.device)

    @cached_property
    def scored(self) -> Any:
        """The same model, checked to compute its log-probs from trunk and head.

        Raises:
            ModelError: it does not, or it is not a causal language model.
        """
        check_definition(self.model)
        return self.model

    @cached_property
    def denoiser(self) -> "Denoiser":
        """A diffusion model, loaded on first use."""
        from dpo_core.models.denoiser import load_denoiser  # noqa: PLC0415 - only for diffusion models

        return load_denoiser(self.path).on_device()

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        if is_denoiser(self.path):
            raise RecipeError(
                f"{self.name} is a diffusion model, and the suite is of language models",
                f"Use {' or '.join(OF_DENOISERS)}",
            )
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
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        *,
        seed: int,
    ) -> list[str]:
        """One sampled answer per prompt, as text without special tokens; repeat a prompt for more answers.

        A prompt is cut if it leaves no room for the answer within `tokens.max_length`.
        """
        room = sampling.max_new_tokens
        tokens = [self.tokenise.prompt_of(prompt._asdict(), room) for prompt in prompts]
        if () in tokens:
            raise ModelError(
                f"the chat template of a prompt alone exceeds {self.tokens.max_prompt_length} tokens",
                "Raise tokens.max_prompt_length",
            )
        self.check_length(max(map(len, tokens), default=0) + room)
        stops = self.tokenise.stop_ids
        drawn = sample(self.scored, tokens, sampling, eos_id=stops, seed=seed, ranks=self.ranks)
        return [self.tokenise.text(c.ids, ids) for c, ids in zip(drawn, tokens, strict=True)]

    def check_length(self, longest: int) -> None:
        """Refuse rows with more tokens than the model or its reference has positions."""
        for subject in (self, self.reference) if self.reference else (self,):
            check_context(config_in(subject.path), longest)

    def sums(self, sequences: Sequence[TokenSequence], precision: Precision, token_budget: int) -> Floats:
        """Summed log-prob of each sequence's completion."""
        self.check_length(max(map(len, sequences), default=0))
        scores = completion_scores(self.scored, sequences, precision, token_budget, ranks=self.ranks)
        return np.array([float(score.logps.double().sum()) for score in scores])

    def classifier(self, spec: str, safe_label: str | None) -> Classifier:
        """The classifier that judges whether answers are safe; see `load_classifier`."""
        return load_classifier(spec, safe_label, self.tokens, device=self.device, ranks=self.ranks)

    def reference_sums(
        self, sequences: Sequence[TokenSequence], precision: Precision, token_budget: int
    ) -> Floats:
        """Summed log-prob of each sequence's completion under the reference, from the cache if possible."""
        assert self.reference is not None
        with tempfile.TemporaryDirectory() as scratch:
            own = self.reference
            reference = Reference(own.path, own.weights, precision, described=own.name)
            caches = self.caches or Path(scratch) / "caches"
            resources = CacheSettings(caches, token_budget, self.device)
            logps = reference_logps(sequences, reference, resources, self.ranks)
            return logps.shard.sums([sequence_key(s) for s in sequences])
