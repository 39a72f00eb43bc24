"""Job that measures policies on held-out prompts and pairs: rewards, KL, entropy, preference accuracy.

One model is in memory at a time: each policy samples and computes the log-probs of its samples, then the
reference computes those of all samples, then the reward scores them.
"""

import base64
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from pyarrow import parquet
from torch import Tensor

from dpo_core.data.files.parquet import read_parquet
from dpo_core.data.tokens.sequences import TokenPair
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.errors import NeedsNewSettings
from dpo_core.evaluation.config import EvaluateConfig
from dpo_core.evaluation.policies import (
    kl_estimates,
    logps_and_entropies,
    preference_accuracy,
    sample_policy,
    sequence_logps,
)
from dpo_core.evaluation.summary import PolicySamples
from dpo_core.generation.images import sample_images
from dpo_core.images.codec import Pixels, as_png, read_pixels
from dpo_core.jobs.files import EvaluationJob
from dpo_core.jobs.start import device
from dpo_core.models.denoiser import load_denoiser
from dpo_core.models.folder import is_denoiser
from dpo_core.models.image_codec import pixels_of
from dpo_core.models.load import load_model, load_tokenizer
from dpo_core.ranks import JobRanks, Ranks
from dpo_core.rewards.ensemble import is_ensemble
from dpo_core.rewards.images import score_images
from dpo_core.rewards.model import Scorer, metadata_of, scorer, scoring_flops_of
from dpo_core.scoring import flops as cost
from dpo_core.scoring.completion_scores import logprob_flops
from dpo_core.scoring.model_shape import shape_of
from dpo_core.scoring.packing_check import share_trials

FILE = EvaluationJob
_SIDE = 96  # pixels of a page for an image, if it has fewer


def run(job: EvaluationJob, ranks: JobRanks) -> dict[str, Any]:
    """The prompts, the measurements by policy, and the operations.

    Raises:
        StageFailed: no prompt or pair is held out.
    """
    if is_denoiser(Path(job.reference)):
        return _of_denoisers(job, ranks)
    tokenise = Tokenise(load_tokenizer(Path(job.reference)), job.tokens)
    evaluation = _Evaluation(job, ranks, tokenise)
    for name in job.policies:
        evaluation.sample(name)
    evaluation.read_with_reference()
    evaluation.score()
    return evaluation.result()


def _of_denoisers(job: EvaluationJob, ranks: Ranks) -> dict[str, Any]:
    """Images and their rewards. A diffusion model has no log-probs, so there is no KL and no accuracy."""
    config, frame = job.config, _held_out(job.prompts, job.config)
    texts = frame["prompt"].tolist()
    index = [place for place in range(len(texts)) for _ in range(config.samples_per_prompt)]
    asked = [texts[place] for place in index]
    files = {
        name: sample_images(
            load_denoiser(Path(path)).on_device(), asked, config.sampling, seed=job.seed, ranks=ranks
        )
        for name, path in job.policies.items()
    }
    # A prompt's images of all policies stand together, which an ensemble compares.
    places = sorted((at, i, name) for name in files for i, at in enumerate(index))
    rewards = score_images(
        job.reward,
        [texts[at] for at, _, _ in places],
        [files[name][i] for _, i, name in places],
        metadata_of(frame.to_dict("records")),
        ranks,
    )
    scored = {(name, i): reward for (_, i, name), reward in zip(places, rewards, strict=True)}
    policies = {}
    for name in files:
        drawn = PolicySamples(index, [], [], [scored[name, i] for i in range(len(index))])
        drawn.texts = [""] * len(index)
        policies[name] = {"samples": asdict(drawn), "accuracy": None, "accuracy_by_source": {}}
    images = []
    for place in range(min(config.shown, len(texts))):
        own = [i for i, at in enumerate(index) if at == place]
        images.append(
            {
                name: list(map(_for_page, read_pixels([listed[i] for i in own])))
                for name, listed in files.items()
            }
        )
    return {"prompts": texts, "held_out_pairs": 0, "policies": policies, "flops": 0.0, "images": images}


def _for_page(pixels: Pixels) -> str:
    """A PNG file of an image (height, width, 3) in base64, drawn larger if it is small."""
    return base64.b64encode(as_png(pixels, max(1, _SIDE // len(pixels)))).decode()


class _Evaluation:
    def __init__(self, job: EvaluationJob, ranks: Ranks, tokenise: Tokenise) -> None:
        self.job, self.ranks, self.tokenise = job, ranks, tokenise
        self.prompts = held_out_prompts(job.prompts, tokenise, job.config)
        # Tables of text have none, and need not be read again.
        told = "metadata" in parquet.read_schema(job.prompts).names
        self.metadata = metadata_of(read_parquet(job.prompts)) if told else {}
        self.pairs = _held_out_pairs(job, tokenise)
        self.sides = [side for pair in self.pairs for side in (pair.chosen, pair.rejected)]
        self.samples: dict[str, PolicySamples] = {}
        self.own: dict[str, list[Tensor]] = {}
        """Log-probs of each policy's samples under itself."""
        self.own_sides: dict[str, list[Tensor]] = {}
        """Log-probs of the held-out pairs under each policy."""
        self.reference_sides: list[Tensor] = []
        self.flops: dict[str, float] = {}
        self.reference_flops = 0.0
        self.trials: dict[str, dict[Any, Any]] = {}

    @property
    def _computing(self) -> tuple[Any, int]:
        return self.job.config.precision, self.job.config.token_budget

    def _load(self, path: str) -> Any:
        model = load_model(Path(path)).to(device())
        share_trials(model, self.trials)
        return model

    def sample(self, name: str) -> None:
        """The policy's answers, and its log-probs of them and of the held-out pairs."""
        job, config = self.job, self.job.config
        same = self._is_reference(name)
        policy = self._load(job.policies[name])
        drawn = sample_policy(
            policy,
            [ids for ids, _ in self.prompts],
            config,
            eos_id=self.tokenise.stop_ids,
            seed=job.seed,
            ranks=self.ranks,
        )
        drawn.texts = [self.tokenise.text(s.completion, s.prompt) for s in drawn.sequences]
        if job.entropies:
            own, drawn.entropies = logps_and_entropies(policy, drawn.sequences, *self._computing, self.ranks)
        else:
            own = sequence_logps(policy, drawn.sequences, *self._computing, self.ranks)
        drawn.entropy = -float(sum(x.double().sum() for x in own)) / sum(len(x) for x in own)
        lengths = [(len(s.prompt), len(s.completion)) for s in drawn.sequences]
        flops = cost.sampling(shape_of(policy), lengths)
        flops += logprob_flops(policy, drawn.sequences, config.token_budget) * (1 if same else 2)
        if self.pairs and not same:
            flops += logprob_flops(policy, self.sides, config.token_budget)
            self.own_sides[name] = sequence_logps(policy, self.sides, *self._computing, self.ranks)
        self.samples[name], self.own[name], self.flops[name] = drawn, own, flops

    def _is_reference(self, name: str) -> bool:
        return name == self.job.reference_name

    def read_with_reference(self) -> None:
        """The KL of every policy, and the reference's log-probs of the held-out pairs."""
        reference = self._load(self.job.reference)
        if self.pairs:
            self.reference_sides = sequence_logps(reference, self.sides, *self._computing, self.ranks)
            self.reference_flops = logprob_flops(reference, self.sides, self.job.config.token_budget)
        for name, drawn in self.samples.items():
            own = self.own[name]
            reference_logps = own
            if not self._is_reference(name):
                reference_logps = sequence_logps(reference, drawn.sequences, *self._computing, self.ranks)
            drawn.kl_k1, drawn.kl_k3 = kl_estimates(own, reference_logps)

    def score(self) -> None:
        """The rewards of all samples."""
        job = self.job
        score = scorer(
            job.reward,
            self.tokenise,
            job.config.precision,
            device=device(),
            ranks=self.ranks,
            metadata=self.metadata,
        )
        if is_ensemble(job.reward):
            self._score_together(score)
            return
        flops_of = scoring_flops_of(job.reward)
        for name, drawn in self.samples.items():
            texts = [self.prompts[index][1] for index in drawn.prompt_index]
            drawn.rewards = score(drawn.sequences, texts)
            self.flops[name] += flops_of(drawn.sequences)

    def _score_together(self, score: Scorer) -> None:
        """Rewards by an ensemble, whose group is then a prompt's samples of all policies: of one policy alone
        they would be 0 in the mean, however good it is."""
        drawn = list(self.samples.values())
        places = [(at, i, k) for k, d in enumerate(drawn) for i, at in enumerate(d.prompt_index)]
        places.sort()
        sequences = [drawn[k].sequences[i] for _, i, k in places]
        rewards = score(sequences, [self.prompts[at][1] for at, _, _ in places])
        for d in drawn:
            d.rewards = [0.0] * len(d.sequences)
        for (_, i, k), reward in zip(places, rewards, strict=True):
            drawn[k].rewards[i] = reward

    def result(self) -> dict[str, Any]:
        """The fields of `EvaluationResult`."""
        return {
            "prompts": [text for _, text in self.prompts],
            "held_out_pairs": len(self.pairs),
            "policies": {name: self._policy(name) for name in self.samples},
            "flops": self.reference_flops + sum(self.flops.values()),
            "images": self._shown_images(),
        }

    def _shown_images(self) -> list[dict[str, list[str]]]:
        """PNG files in base64 of the prompts that the page shows, by policy; empty for a model of text."""
        images = self.tokenise.images
        if images is None:
            return []
        shown = []
        for index in range(min(self.job.config.shown, len(self.prompts))):
            by_policy = {}
            for name, drawn in self.samples.items():
                texts = [t for t, at in zip(drawn.texts, drawn.prompt_index, strict=True) if at == index]
                pixels_N = pixels_of(images, texts, self.tokenise.tokenizer.name_or_path)
                by_policy[name] = list(map(_for_page, pixels_N))
            shown.append(by_policy)
        return shown

    def _policy(self, name: str) -> dict[str, Any]:
        own = self.own_sides.get(name)
        if own is None:
            return {"samples": asdict(self.samples[name]), "accuracy": None, "accuracy_by_source": {}}
        accuracy = preference_accuracy(self.pairs, own, self.reference_sides).model_dump()
        by_source = _accuracy_by_source(self.pairs, own, self.reference_sides, _sources(str(self.job.pairs)))
        return {"samples": asdict(self.samples[name]), "accuracy": accuracy, "accuracy_by_source": by_source}


def held_out_prompts(
    path: str, tokenise: Tokenise, config: EvaluateConfig
) -> list[tuple[tuple[int, ...], str]]:
    """Ids and text of each held-out prompt, at most `config.prompts`."""
    frame = _held_out(path, config)
    room = config.sampling.max_new_tokens
    prompts = [(tokenise.prompt_of(row, room), row["prompt"]) for row in frame.to_dict("records")]
    return [(ids, text) for ids, text in prompts if ids]


def _held_out(path: str, config: EvaluateConfig) -> pd.DataFrame:
    """The rows of the first `config.prompts` held-out prompts, one of each."""
    frame = pd.read_parquet(path)
    frame = frame[frame["split"] == "eval"].drop_duplicates(["prompt", "chat"]).head(config.prompts)
    if frame.empty:
        raise NeedsNewSettings("no held-out prompt is left to evaluate on", "Raise data.eval_fraction")
    return frame


def _held_out_pairs(job: EvaluationJob, tokenise: Tokenise) -> list[TokenPair]:
    """The held-out pairs, at most `config.pairs` chosen with the seed; empty if the rows are not pairs."""
    if job.pairs is None:
        return []
    frame = pd.read_parquet(job.pairs)
    if "chosen" not in frame:
        return []
    frame = frame[frame["split"] == "eval"]
    if len(frame) > job.config.pairs:
        frame = frame.sample(job.config.pairs, random_state=job.seed)
    return tokenise.pairs(frame.to_dict("records"))[0]


def _sources(path: str) -> dict[str, str]:
    """The data set of a mixture that each held-out pair comes from, by its id; empty for a single set."""
    frame = pd.read_parquet(path)
    if "source" not in frame:
        return {}
    frame = frame[(frame["split"] == "eval") & (frame["source"] != "")]
    return dict(zip(frame["id"], frame["source"], strict=True))


def _accuracy_by_source(
    pairs: Sequence[TokenPair], own: Sequence[Tensor], reference: Sequence[Tensor], sources: dict[str, str]
) -> dict[str, Any]:
    """The preference accuracy on the held-out pairs of each data set of a mixture."""
    places: dict[str, list[int]] = {}
    for at, pair in enumerate(pairs):
        if source := sources.get(pair.id):
            places.setdefault(source, []).append(at)
    accuracies = {}
    for source, listed in places.items():
        sides = [side for at in listed for side in (2 * at, 2 * at + 1)]
        some = [pairs[at] for at in listed], [own[i] for i in sides], [reference[i] for i in sides]
        accuracies[source] = preference_accuracy(*some).model_dump()
    return accuracies
