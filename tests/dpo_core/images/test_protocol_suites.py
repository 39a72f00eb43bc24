"""GenEval and T2I-CompBench as suites: images for their scripts, and their results read back."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dpo_core.data.config import DataConfig
from dpo_core.data.load import load
from dpo_core.data.tokens.config import TokenConfig
from dpo_core.errors import DataError, RecipeError, StageFailed
from dpo_core.evaluation.config import SuiteConfig
from dpo_core.evaluation.model_under_test import ModelUnderTest
from dpo_core.evaluation.results import SuiteResult
from dpo_core.evaluation.run_suite import data_digest, data_file, run_suite
from dpo_core.evaluation.suites.registry import find
from dpo_core.generation.config import SamplingConfig
from dpo_core.images.prompts import records
from dpo_core.images.records import read_record, requirements
from dpo_core.images.scenes import detect
from dpo_core.jobs.files import NamedModel
from tasks.stages.suite_results import SuiteRequest

SAMPLING = SamplingConfig(max_new_tokens=64, precision="fp32")
TOKENS = TokenConfig(max_length=88, max_prompt_length=24)


@pytest.fixture
def subject(scenes_model: Path) -> ModelUnderTest:
    return ModelUnderTest(scenes_model, "tiny", TOKENS)


def config(tmp_path: Path, samples: int = 2, **fields: Any) -> SuiteConfig:
    return SuiteConfig(sampling=SAMPLING, samples=samples, images=str(tmp_path / "images"), **fields)


def judged(folder: Path) -> list[dict[str, Any]]:
    """As evaluate_images.py: the rows of all images, some of them called correct by their first pixel."""
    rows = []
    for place in sorted((folder / "images").iterdir()):
        record = read_record((place / "metadata.jsonl").read_text())
        for file in sorted((place / "samples").iterdir()):
            assert re.match(r"\d+\.png", file.name)
            pixels = np.asarray(Image.open(file))
            correct = all(r.holds for r in requirements(record, detect(pixels[None])[0]))
            correct = correct or bool(pixels.sum() % 3 == 0)
            rows.append(
                {
                    "filename": str(file),
                    "tag": record.tag,
                    "prompt": record.prompt,
                    "correct": correct,
                    "reason": "" if correct else "no ring",
                    "metadata": record.to_json(),
                    "details": "{}",
                }
            )
    return rows


def official_summary(file: Path) -> tuple[float, float, float]:
    """As summary_scores.py: the share of correct images and prompts, and the mean over the tags."""
    frame = pd.read_json(file, orient="records", lines=True)
    tags = [group["correct"].mean() for _, group in frame.groupby("tag", sort=False)]
    return frame["correct"].mean(), frame.groupby("metadata")["correct"].any().mean(), float(np.mean(tags))


def run_geneval(subject: ModelUnderTest, tmp_path: Path, settings: SuiteConfig) -> SuiteResult:
    return run_suite(find("geneval"), subject, tmp_path / "evaluation_metadata.jsonl", settings)


def written(subject: ModelUnderTest, tmp_path: Path, settings: SuiteConfig) -> Path:
    """The folder of the images that the first call writes."""
    with pytest.raises(StageFailed, match="not judged yet") as caught:
        run_geneval(subject, tmp_path, settings)
    (folder,) = (tmp_path / "images").iterdir()
    assert f"evaluate_images.py {folder / 'images'} --outfile" in caught.value.remedy
    return folder


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    # Tags with different numbers of prompts: their mean is not that of the images.
    asked = [r for i, r in enumerate(records("gen", 2, 7)) if i != 1]
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("\n".join(r.to_json() for r in asked))
    return file


def test_the_suite_reads_back_what_geneval_says_of_its_images(
    subject: ModelUnderTest, tmp_path: Path, metadata: Path
) -> None:
    settings = config(tmp_path)
    folder = written(subject, tmp_path, settings)
    request = SuiteRequest(
        [NamedModel(name="tiny", path=str(subject.path), tokens=TOKENS)], {"geneval": metadata}, settings
    )
    before = request.keys
    rows = judged(folder)
    results = folder / "results.jsonl"
    results.write_text("\n".join(map(json.dumps, rows)))
    stamp = {file: file.stat().st_mtime_ns for file in folder.rglob("*.png")}
    assert len(stamp) == 11 * 2
    result = run_geneval(subject, tmp_path, settings)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.png")} == stamp, "not sampled again"
    images, prompts, score = official_summary(results)
    assert 0 < score < 1
    assert score != pytest.approx(images, abs=1e-3)
    measured = {name: result.measure(name) for name in ("score", "correct", "any")}
    assert measured["score"].estimate.value == pytest.approx(score, abs=1e-12)  # type: ignore[union-attr]
    assert measured["correct"].estimate.value == pytest.approx(images, abs=1e-12)  # type: ignore[union-attr]
    assert measured["any"].estimate.value == pytest.approx(prompts, abs=1e-12)  # type: ignore[union-attr]
    frame = pd.DataFrame(rows)
    for tag, group in frame.groupby("tag"):
        by_tag = result.measure("correct", str(tag))
        assert by_tag is not None
        assert by_tag.estimate.low < by_tag.estimate.high
        assert by_tag.estimate.value == pytest.approx(group["correct"].mean())
    again = SuiteRequest(request.models, request.files, settings)
    assert again.keys != before, "a cached result belongs to the results that it was read from"


def test_results_of_other_images_are_refused(subject: ModelUnderTest, tmp_path: Path, metadata: Path) -> None:
    folder = written(subject, tmp_path, config(tmp_path))
    rows = judged(folder)
    for changed, names in [
        (rows[:-1], "1 results of prompt 10, not 2 of different images"),
        ([*rows, rows[0]], "3 results of prompt 0, not 2"),
        ([rows[0], rows[0], *rows[2:]], "2 results of prompt 0, not 2"),
        ([{**rows[0], "prompt": "a dog"}, *rows[1:]], "another prompt than"),
        ([*rows, {**rows[0], "filename": "x/00099/samples/0.png"}], "results of a prompt 99"),
        ([{**rows[0], "filename": "0.png"}, *rows[1:]], "in no prompt's folder"),
    ]:
        (folder / "results.jsonl").write_text("\n".join(map(json.dumps, changed)))
        with pytest.raises(DataError, match=names):
            run_geneval(subject, tmp_path, config(tmp_path))


def test_compbench_is_read_by_category(subject: ModelUnderTest, tmp_path: Path) -> None:
    asked = {"color": 3, "spatial": 2}
    for tag, count in asked.items():
        prompts = [r.prompt for r in records("comp", 9, 1) if r.tag == tag][:count]
        (tmp_path / f"{tag}_val.txt").write_text("\n".join(prompts) + "\n")
    suite, settings = find("compbench"), config(tmp_path, samples=3)
    file = data_file(suite, tmp_path)
    digest = data_digest(suite, file)
    with pytest.raises(StageFailed, match="color, spatial are not judged yet"):
        run_suite(suite, subject, file, settings)
    (folder,) = (tmp_path / "images").iterdir()
    answers = {name: np.random.default_rng(5).random(count * 3) for name, count in asked.items()}
    for name, place in (("color", "annotation_blip"), ("spatial", "labels/annotation_obj_detection_2d")):
        names = [p.name for p in (folder / "images" / name / "samples").iterdir()]
        assert sorted(int(n.split("_")[-1].split(".")[0]) for n in names) == list(range(asked[name] * 3))
        out = folder / "images" / name / place
        out.mkdir(parents=True)
        rows = [{"question_id": i, "answer": f"{a:.4f}"} for i, a in enumerate(answers[name])]
        (out / "vqa_result.json").write_text(json.dumps(rows[::-1]))
    result = run_suite(suite, subject, file, settings)
    for name, values in answers.items():
        own = result.measure("answer", name)
        assert own is not None
        assert own.estimate.value == pytest.approx(values.mean(), abs=1e-4)
    score = result.measure("score")
    assert score is not None
    assert score.estimate.value == pytest.approx(np.mean([v.mean() for v in answers.values()]), abs=1e-4)
    (out / "vqa_result.json").write_text('[{"question_id": 0, "answer": 1}]')
    with pytest.raises(DataError, match="not one for each of the 6 images"):
        run_suite(suite, subject, file, settings)
    (tmp_path / "complex_val.txt").write_text("a red ring\n")
    assert data_digest(suite, file) != digest
    with pytest.raises(RecipeError, match="needs 10 images of each"):
        run_suite(suite, subject, file, settings)


def test_a_folder_is_needed_and_models_of_text_are_refused(
    tiny: Path, tmp_path: Path, metadata: Path
) -> None:
    with pytest.raises(RecipeError, match="there is no folder for them"):
        find("geneval").check(SuiteConfig())
    with pytest.raises(RecipeError, match="does not make images"):
        run_geneval(ModelUnderTest(tiny, "text"), tmp_path, config(tmp_path))


def test_prompts_of_both_are_data_with_metadata(tmp_path: Path, metadata: Path) -> None:
    loaded = load(DataConfig(path=str(metadata)))
    assert (loaded.kind, loaded.format) == ("prompts", "geneval")
    told = [read_record(text) for text in loaded.frame["metadata"]]
    assert told == [read_record(line) for line in metadata.read_text().splitlines()]
    assert [r.prompt for r in told] == list(loaded.frame["prompt"])
    metadata.write_text('{"tag": "a", "include": [], "prompt": "b"}\n')
    assert "image metadata" in load(DataConfig(path=str(metadata))).frame["fault"][0]
    lines = tmp_path / "compbench_3d_spatial_train.txt"
    lines.write_text("a dog in front of a desk\n\na ring\n")
    loaded = load(DataConfig(path=str(lines)))
    assert (loaded.kind, loaded.format) == ("prompts", "compbench")
    assert list(loaded.frame["prompt"]) == ["a dog in front of a desk", "a ring"]
    assert set(loaded.frame["metadata"]) == {'{"category":"3d_spatial"}'}
