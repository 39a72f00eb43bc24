"""The jobs of a run on a small diffusion model: import, gate, pairs, evaluation, suite."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dpo_core.data.config import DataConfig
from dpo_core.data.load import load
from dpo_core.data.split import split_table
from dpo_core.data.tokens.config import TokenConfig
from dpo_core.errors import RecipeError, StageFailed
from dpo_core.evaluation.config import EvaluateConfig, SuiteConfig
from dpo_core.evaluation.model_under_test import ModelUnderTest
from dpo_core.evaluation.results import SuiteResult
from dpo_core.evaluation.run_suite import run_suite
from dpo_core.evaluation.suites.registry import find
from dpo_core.evaluation.summary import PolicySamples, summarise_samples
from dpo_core.generation.config import SamplingConfig
from dpo_core.images.codec import as_png, read_pixels
from dpo_core.images.files import inline_name, read_bytes
from dpo_core.images.records import read_record
from dpo_core.images.rewards import rewards_of
from dpo_core.images.solid import PROMPT_FILE, prompts
from dpo_core.jobs.evaluate import run as evaluate
from dpo_core.jobs.files import (
    EvaluationJob,
    ImportJob,
    NamedModel,
    PairSamplingJob,
    SuitesJob,
)
from dpo_core.jobs.import_model import run as import_model
from dpo_core.jobs.sample_pairs import run as sample_pairs
from dpo_core.jobs.suites import run as suites
from dpo_core.methods.pair_sampling import PairSamplingConfig
from dpo_core.models.config import DenoiserConfig, ModelConfig
from dpo_core.models.source import check_source_context, source_digest, weights_digest
from dpo_core.ranks import JobRanks, SingleRank
from expectations.config import GateConfig
from expectations.job import run as judge
from expectations.job_file import GateJob
from tests.support.models.tiny import make_tiny_model
from tests.support.models.tiny_diffusion import make_tiny_diffusion

SAMPLING = SamplingConfig(denoising_steps=2, guidance=2.0, batch_size=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new model of solid scenes, imported."""
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig(denoiser=DenoiserConfig(layers=1, width=16, heads=2))
    job = ImportJob(work=str(folder), model=config, out=str(folder / "out"), longest=64, precision="fp32")
    assert import_model(job, SingleRank())["layout"] == "images"
    return folder / "out"


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The canonical table of three prompts to make pairs of and two held-out ones."""
    path = tmp_path_factory.mktemp("asked") / "data.parquet"
    config = DataConfig(solid_scenes=True)
    frame = split_table(load(config), config)
    assert frame["split"].value_counts().to_dict() == {
        "eval": len(prompts(True)),
        "train": len(prompts(False)),
    }
    sides = [frame[frame["split"] == side].iloc[::20].head(n) for side, n in (("train", 3), ("eval", 2))]
    pd.concat(sides).to_parquet(path, index=False)
    return path


def pairs_job(folder: Path, model: Path, asked: Path, reward: str = "scenes:graded") -> PairSamplingJob:
    config = PairSamplingConfig(
        samples_per_prompt=4, pairing="extremes", pairs_per_prompt=2, sampling=SAMPLING
    )
    return PairSamplingJob(
        work=str(folder), prompts=str(asked), model=str(model), out=str(folder / "pairs.parquet"),
        config=config, tokens=TokenConfig(), reward=reward, seed=3,
    )  # fmt: skip


def gate_job(folder: Path, model: Path, rows: Path) -> GateJob:
    return GateJob(
        work=str(folder), subject="pairs", rows=str(rows), model=str(model), config=GateConfig(),
        tokens=TokenConfig(), docs=str(folder / "docs"), out=str(folder / "judged.parquet"),
    )  # fmt: skip


def test_a_folder_of_diffusers_is_copied_without_pickled_files(tmp_path: Path) -> None:
    source = make_tiny_diffusion(tmp_path / "source", "epsilon")
    (source / "unet" / "more.bin").write_bytes(b"code")
    out = tmp_path / "out"
    job = ImportJob(work=str(tmp_path), model=ModelConfig(name=str(source)), out=str(out), longest=10_000)
    assert import_model(job, SingleRank())["sampling"] == "denoising"
    assert not (out / "unet" / "more.bin").exists()
    check_source_context(out, 10_000)
    before = weights_digest(out), source_digest(out)
    weights = next((out / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    after = weights_digest(out), source_digest(out)
    assert all(a != b for a, b in zip(after, before, strict=True))


def test_pairs_are_the_best_and_the_worst_images_and_pass_the_gate(
    model: Path, asked: Path, tmp_path: Path
) -> None:
    counts = sample_pairs(pairs_job(tmp_path, model, asked), JobRanks(tmp_path))
    assert counts is not None
    assert (counts["samples"], counts["pairs"]) == (12, 6)
    frame = pd.read_parquet(tmp_path / "pairs.parquet")
    assert set(frame["split"]) == {"train"}, "held-out prompts make no pairs"
    records = {r.prompt: r for r in prompts(held_out=False)}
    listed = [records[prompt] for prompt in frame["prompt"]]
    better, worse = (
        rewards_of("graded", listed, read_pixels([read_bytes(name) for name in frame[side]]))
        for side in ("chosen", "rejected")
    )
    assert all(a > b for a, b in zip(better, worse, strict=True))
    result = judge(gate_job(tmp_path, model, tmp_path / "pairs.parquet"), JobRanks(tmp_path))
    assert not result["report"]["refused"]
    failed = [f["rule"] for f in result["report"]["findings"] if not f["passed"] and "length" in f["rule"]]
    assert failed == [], "the length of an image's name is no length of an answer"
    assert (result["rows"], result["answer_tokens"], result["written_as"]) == (6, None, "")


def test_an_image_that_breaks_a_rule_is_a_fault_of_its_pair(
    model: Path, asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    drawn = iter([as_png(np.full((16, 16, 3), 90, np.uint8)), *map(as_png, noise)] * 3)
    monkeypatch.setattr("dpo_core.jobs.sample_pairs.sample_images", lambda *_, **__: list(drawn))
    sample_pairs(pairs_job(tmp_path, model, asked), JobRanks(tmp_path))
    frame = pd.read_parquet(tmp_path / "pairs.parquet")
    assert sum("one colour only" in fault for fault in frame["fault"]) == 3
    report = judge(gate_job(tmp_path, model, tmp_path / "pairs.parquet"), JobRanks(tmp_path))["report"]
    assert report["refused"]
    (finding,) = [f for f in report["findings"] if f["rule"] == "pairs/fault"]
    assert "one colour only" in finding["message"]


def test_a_reward_of_texts_is_refused(model: Path, asked: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="reads texts"):
        sample_pairs(pairs_job(tmp_path, model, asked, "sentiment"), JobRanks(tmp_path))


def test_policies_begin_with_the_same_noise_and_have_no_kl(model: Path, asked: Path, tmp_path: Path) -> None:
    job = EvaluationJob(
        work=str(tmp_path), policies={"SFT": str(model), "Same": str(model)}, reference=str(model),
        reference_name="SFT", prompts=str(asked), pairs=str(asked),
        config=EvaluateConfig(prompts=8, samples_per_prompt=2, shown=1, sampling=SAMPLING),
        tokens=TokenConfig(), reward="scenes:graded", seed=1,
    )  # fmt: skip
    result = evaluate(job, JobRanks(tmp_path))
    assert (len(result["prompts"]), result["held_out_pairs"], len(result["images"])) == (2, 0, 1)
    own, other = (PolicySamples(**result["policies"][name]["samples"]) for name in ("SFT", "Same"))
    assert len(set(own.rewards)) == 4, "four images of different noise"
    assert own.rewards == other.rewards
    assert result["images"][0]["SFT"] == result["images"][0]["Same"]
    row = summarise_samples(other, own, seed=0, length=8)
    assert row.keys() == {"reward", "gain", "win_rate"}
    assert row["gain"]["value"] == 0


def suites_job(folder: Path, model: Path, suite: str) -> SuitesJob:
    named = NamedModel(name="M", path=str(model), tokens=TokenConfig())
    config = SuiteConfig(limit=5, samples=2, sampling=SAMPLING)
    return SuitesJob(
        work=str(folder), models=[named], model_suites=[("M", suite)], config=config, reference=named,
        files={suite: str(find(suite).packaged)}, caches=str(folder / "caches"),
    )  # fmt: skip


def test_the_suite_asks_for_the_held_out_prompts(model: Path, tmp_path: Path) -> None:
    assert [read_record(line) for line in PROMPT_FILE.read_text().splitlines()] == prompts(held_out=True)
    (made,) = suites(suites_job(tmp_path, model, "scenes_solid"), JobRanks(tmp_path))["results"]
    result = SuiteResult.model_validate(made)
    assert len(result.items) == 5
    assert {measure.name for measure in result.measures} == {"score", "correct", "graded", "clutter"}
    for item in result.items:
        assert 0 < item.values["graded"] < 1


def test_images_are_written_for_the_scripts_of_geneval(model: Path, tmp_path: Path) -> None:
    settings = SuiteConfig(limit=3, samples=2, sampling=SAMPLING, images=str(tmp_path / "images"))
    suite = find("geneval")
    with pytest.raises(StageFailed, match="not judged yet"):
        run_suite(suite, ModelUnderTest(model, "M"), PROMPT_FILE, settings)
    files = sorted((tmp_path / "images").rglob("*.png"))
    assert [file.name for file in files] == ["00000.png", "00001.png"] * 3
    assert read_pixels([file.read_bytes() for file in files]).shape == (6, 16, 16, 3)


def test_suites_refuse_models_of_the_other_kind(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a diffusion model, and the suite is of language models"):
        suites(suites_job(tmp_path / "a", model, "scenes"), JobRanks(tmp_path / "a"))
    text = make_tiny_model(tmp_path / "text")
    with pytest.raises(RecipeError, match="is no diffusion model of images of 16 x 16 pixels"):
        suites(suites_job(tmp_path / "b", text, "scenes_solid"), JobRanks(tmp_path / "b"))


def test_a_name_holds_its_image() -> None:
    png = as_png(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    assert read_bytes(inline_name(png)) == png
