"""The folders that the official scripts read, and their results."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dpo_core.errors import DataError
from dpo_core.images import prompts, protocols
from dpo_core.images.records import read_record, requirements
from dpo_core.images.scenes import detect, draw


def _image() -> Image.Image:
    return Image.fromarray(np.zeros((4, 4, 3), np.uint8))


def test_geneval_reads_the_folders_and_its_summary_is_our_score(tmp_path):
    """Follows evaluate_images.py and summary_scores.py: names, metadata, and the mean over tags."""
    records = prompts.records("gen", 4, seed=0)
    scenes = list(prompts.captioned_scenes(len(records), 0, 0.0))
    drawn = [(r, [Image.fromarray(draw(things))]) for r, (_, things) in zip(records, scenes, strict=True)]
    protocols.write_geneval(tmp_path / "images", drawn)
    lines = []
    for folder in sorted((tmp_path / "images").iterdir()):
        assert folder.name.isdigit()
        record = read_record((folder / "metadata.jsonl").read_text())
        for file in sorted((folder / "samples").iterdir()):
            assert re.match(r"\d+\.png", file.name)
            things = detect(np.asarray(Image.open(file))[None])[0]
            correct = all(r.holds for r in requirements(record, things))
            row = {"filename": str(file), "tag": record.tag, "prompt": record.prompt, "correct": correct}
            lines.append(json.dumps(row | {"reason": "", "metadata": record.to_json(), "details": "{}"}))
    results = tmp_path / "results.jsonl"
    results.write_text("\n".join(lines))
    frame = pd.read_json(results, orient="records", lines=True)
    official = np.mean([group["correct"].mean() for _, group in frame.groupby("tag", sort=False)])
    score, tags = protocols.geneval_score(protocols.read_geneval(results))
    assert score == pytest.approx(official, abs=1e-9)
    assert set(tags) == set(prompts.TAGS["gen"])
    assert 0 < score < 1


def test_compbench_reads_prompt_and_number_back_from_the_names(tmp_path):
    protocols.write_compbench(
        tmp_path / "out", {"color": [("a red ring", [_image()] * 2), ("a b", [_image()])]}
    )
    names = sorted(p.name for p in (tmp_path / "out" / "color" / "samples").iterdir())
    assert [name.split("_")[0] for name in names] == ["a b", "a red ring", "a red ring"]
    assert [int(name.split("_")[-1].split(".")[0]) for name in names] == [2, 0, 1]


@pytest.mark.parametrize("prompt", ["snake_case", "a/b", "", "x" * 250])
def test_a_prompt_that_is_no_file_name_is_refused(tmp_path, prompt):
    with pytest.raises(DataError, match="cannot be the name of a file"):
        protocols.write_compbench(tmp_path / "out", {"color": [(prompt, [_image()])]})


def test_images_of_another_run_are_not_mixed_in(tmp_path):
    (tmp_path / "old.png").touch()
    with pytest.raises(DataError, match="not empty"):
        protocols.write_geneval(tmp_path, [])
    with pytest.raises(DataError, match="not empty"):
        protocols.write_compbench(tmp_path, {})


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("{", "not JSON"),
        ("[]", "not a list of results"),
        ('[{"question_id": 0}]', "row 0"),
        ('[{"question_id": 0, "answer": 1.5}]', "row 0"),
        ('[{"question_id": 1, "answer": 1}, {"question_id": 1, "answer": 0}]', "two results for question 1"),
        ('["a"]', "row 0"),
    ],
)
def test_bad_results_of_compbench_are_refused(tmp_path, content, names):
    (tmp_path / "vqa_result.json").write_text(content)
    with pytest.raises(DataError, match=names):
        protocols.read_compbench(tmp_path / "vqa_result.json")


def test_results_of_compbench_are_read_by_question(tmp_path):
    file = tmp_path / "vqa_result.json"
    file.write_text('[{"question_id": 7, "answer": "0.25"}, {"question_id": 0, "answer": 1, "extra": 1}]')
    assert [(row.question_id, row.answer) for row in protocols.read_compbench(file)] == [(0, 1.0), (7, 0.25)]


@pytest.mark.parametrize(("content", "names"), [("", "no results"), ('{"tag": 1}', "line 1")])
def test_bad_results_of_geneval_are_refused(tmp_path, content, names):
    (tmp_path / "results.jsonl").write_text(content)
    with pytest.raises(DataError, match=names):
        protocols.read_geneval(tmp_path / "results.jsonl")
