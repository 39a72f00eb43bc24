"""Jobs that compute with a model, on a GPU: their numbers are those of the CPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from dpo_core.data.tokens.config import TokenConfig
from dpo_core.evaluation.config import EvaluateConfig
from dpo_core.generation.config import SamplingConfig
from dpo_core.jobs.files import (
    EvaluationJob,
    ModelJob,
    PairSamplingJob,
    ReferenceJob,
    RewardQualityJob,
    ScoreJob,
)
from dpo_core.methods.pair_sampling import PairSamplingConfig
from dpo_core.models.load import load_model, load_tokenizer
from dpo_core.models.reward_model import RewardModel
from dpo_core.models.source import weights_digest
from dpo_core.reference import LogpShard
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.jobs import on, run_rendered
from tests.support.runs.training_jobs import TOKENS, pair_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SAMPLING = SamplingConfig(max_new_tokens=8, batch_size=4, precision="fp32")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two policies, a reward model, and pairs of both splits."""
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("SFT", "DPO")):
        make_tiny_model(folder / name, seed, taught=True)
    base = folder / "SFT"
    reward = RewardModel(load_model(base).get_decoder(), torch.Generator().manual_seed(1))
    reward.save(folder / "reward")
    load_tokenizer(base).save_pretrained(folder / "reward")
    (folder / "reward" / "reward.json").write_text("{}")
    rows = [
        row | {"row": number, "split": "train" if number % 3 else "eval", "source": "set"}
        for number, row in enumerate(pair_rows(48))
    ]
    pd.DataFrame(rows).to_parquet(folder / "rows.parquet", index=False)
    return folder


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Runs the job that `make` returns for a work folder on the CPU and on the GPU; returns both results."""

    def run(make: Any) -> list[tuple[Path, dict[str, Any]]]:
        results = []
        for device, visible in (("cpu", ""), ("gpu", "0")):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
            job: ModelJob = make(tmp_path / device)
            results.append((tmp_path / device, run_rendered(job)))
        return results

    return run


def evaluation(work: Path, made: Path, precision: Any = "fp32") -> EvaluationJob:
    return EvaluationJob(
        **on(work, 1),
        policies={name: str(made / name) for name in ("SFT", "DPO")},
        reference=str(made / "SFT"),
        reference_name="SFT",
        prompts=str(made / "rows.parquet"),
        pairs=str(made / "rows.parquet"),
        config=EvaluateConfig(prompts=16, samples_per_prompt=2, sampling=SAMPLING, precision=precision),
        tokens=TOKENS,
        reward="sentiment",
        seed=5,
    )


def test_evaluation(both: Any, made: Path) -> None:
    (_, cpu), (_, gpu) = both(lambda work: evaluation(work, made))
    for name in ("SFT", "DPO"):
        ours, theirs = gpu["policies"][name]["samples"], cpu["policies"][name]["samples"]
        assert ours["kl_k3"] == pytest.approx(theirs["kl_k3"], abs=1e-4)
        assert ours["entropies"] == pytest.approx(theirs["entropies"], abs=1e-4)
    policy = gpu["policies"]["DPO"]["samples"], cpu["policies"]["DPO"]["samples"]
    assert policy[0]["kl_k3"] != policy[1]["kl_k3"], "a GPU rounds otherwise"
    assert gpu["policies"]["DPO"]["accuracy"] == cpu["policies"]["DPO"]["accuracy"]


def test_evaluation_in_bf16_is_near(both: Any, made: Path, tmp_path: Path) -> None:
    exact = run_rendered(evaluation(tmp_path / "fp32", made))["policies"]["DPO"]["samples"]["entropies"]
    half = run_rendered(evaluation(tmp_path / "bf16", made, "bf16"))["policies"]["DPO"]["samples"][
        "entropies"
    ]
    assert sum(half) / len(half) == pytest.approx(sum(exact) / len(exact), rel=0.05)


def test_pair_sampling(both: Any, made: Path) -> None:
    def make(work: Path) -> PairSamplingJob:
        return PairSamplingJob(
            **on(work, 1),
            prompts=str(made / "rows.parquet"),
            model=str(made / "DPO"),
            out=str(work / "pairs.parquet"),
            config=PairSamplingConfig(samples_per_prompt=3, sampling=SAMPLING),
            tokens=TOKENS,
            reward="sentiment",
            seed=3,
        )

    (cpu, expected), (gpu, counts) = both(make)
    assert counts == expected
    pd.testing.assert_frame_equal(
        pd.read_parquet(gpu / "pairs.parquet"), pd.read_parquet(cpu / "pairs.parquet")
    )


def test_rewards_of_a_model(both: Any, made: Path, tmp_path: Path) -> None:
    answers = tmp_path / "answers.parquet"
    rows = [{"prompt": "The film was", "chat": False, "answer": " good" * n} for n in range(1, 25)]
    pd.DataFrame(rows).to_parquet(answers)

    def make(work: Path) -> ScoreJob:
        tokens = TokenConfig(max_length=64, max_prompt_length=32)
        return ScoreJob(**on(work, 1), reward=str(made / "reward"), answers=str(answers), tokens=tokens)

    (_, cpu), (_, gpu) = both(make)
    assert gpu["rewards"] == pytest.approx(cpu["rewards"], abs=1e-4)


def test_quality_of_a_reward_model(both: Any, made: Path) -> None:
    def make(work: Path) -> RewardQualityJob:
        return RewardQualityJob(
            **on(work, 1),
            model=str(made / "reward"),
            pairs=str(made / "rows.parquet"),
            tokens=TOKENS,
            precision="fp32",
            seed=0,
        )

    (_, cpu), (_, gpu) = both(make)
    assert gpu["accuracy"] == cpu["accuracy"]


def test_reference_log_probs(both: Any, made: Path) -> None:
    rows = pd.read_parquet(made / "rows.parquet").assign(chosen_ended=True, rejected_ended=True)
    rows["id"] = [f"row-{number}" for number in range(len(rows))]
    rows.to_parquet(made / "ended.parquet", index=False)

    def make(work: Path) -> ReferenceJob:
        return ReferenceJob(
            **on(work, 1),
            model=str(made / "SFT"),
            weights_sha256=weights_digest(made / "SFT"),
            described="tiny",
            rows=str(made / "ended.parquet"),
            method="dpo",
            settings={"engine": {"precision": "fp32"}},
            tokens=TOKENS,
            caches=str(work / "caches"),
            out=str(work / "out"),
        )

    (cpu, _), (gpu, _) = both(make)
    expected, logps = (LogpShard.open(folder / "out") for folder in (cpu, gpu))
    assert (logps.keys_N2 == expected.keys_N2).all()
    torch.testing.assert_close(torch.tensor(logps.values), torch.tensor(expected.values), rtol=0, atol=1e-3)
