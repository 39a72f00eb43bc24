"""Pairs of images from public sets, and every rule that an image or a pair can break."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from dpo_core.data.config import DataConfig
from dpo_core.data.load import load
from dpo_core.data.records import Loaded
from dpo_core.errors import DataError
from dpo_core.images.files import names_image, pair_fault, read_bytes
from dpo_core.methods.diffusion import DiffusionConfig
from dpo_core.trainers.diffusion import encode


def noise(seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB", kind: str = "png") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def plain(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "png")
    return buffer.getvalue()


def pick_row(first: Any = None, second: Any = None, labels: tuple[float, float] = (1, 0), **more: Any) -> Any:
    return {
        "caption": "a dog",
        "jpg_0": noise(0) if first is None else first,
        "jpg_1": noise(1) if second is None else second,
        "label_0": labels[0],
        "label_1": labels[1],
        "are_different": True,
        "has_label": True,
        "ranking_id": 3,
        **more,
    }


def read(tmp_path: Path, rows: list[Any], **fields: Any) -> Loaded:
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    return load(DataConfig(path=str(tmp_path / "rows.parquet"), images=str(tmp_path / "kept"), **fields))


def test_pick_a_pic_keeps_bytes_once_and_drops_the_undecided(tmp_path: Path) -> None:
    a, b, c = noise(0), noise(1, kind="jpeg"), noise(2)
    rows = [
        pick_row(a, b),
        pick_row(a, c, (0, 1)),
        pick_row(b, c, (0.5, 0.5)),
        pick_row(b, c, has_label=False),
    ]
    loaded = read(tmp_path, rows)
    assert (loaded.kind, loaded.format) == ("pairs", "pickapic")
    assert loaded.notes == {"rows_read": 4, "ties_dropped": 2, "faults": 0}
    frame = loaded.frame
    assert all(map(names_image, [*frame["chosen"], *frame["rejected"]]))
    assert [[read_bytes(x) for x in (r.chosen, r.rejected)] for r in frame.itertuples()] == [[a, b], [c, a]]
    assert len([p for p in (tmp_path / "kept").rglob("*") if p.is_file()]) == 3
    nowhere = load(DataConfig(path=str(tmp_path / "rows.parquet"))).frame
    assert nowhere["fault"].str.contains("data.images names no folder").sum() == 2
    (path,) = [p for p in (tmp_path / "kept").rglob("*") if p.is_file() and p.read_bytes() == c]
    path.write_bytes(b)
    with pytest.raises(DataError, match="was changed after the data were read"):
        read_bytes(frame["chosen"][1])


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("row", "names"),
    [
        (pick_row(b""), "the chosen image has no bytes"),
        (pick_row(second=b"no image"), "the rejected image is no image that can be read"),
        (pick_row(cut(noise(0, (64, 64)))), "the chosen image is no image that can be read"),
        (pick_row(second=plain("red")), "the rejected image is of one colour only"),
        (pick_row(noise(0), noise(0)), "the two images are equal"),
        (pick_row(noise(0), noise(0, kind="bmp")), "the two images are equal"),
        (pick_row(noise(0, (8, 9))), "the two images differ in size"),
        (pick_row(noise(0, mode="RGBA")), r"the chosen image has transparency or a palette \(mode RGBA\)"),
        (pick_row(second=noise(0, mode="P")), r"the rejected image has transparency or a palette \(mode P\)"),
        (pick_row(jpg_0="text"), "jpg_0 holds no bytes"),
        (pick_row(labels=(1, 1)), "label_0 and label_1 are 1 and 1"),
    ],
)
def test_each_rule_of_images_makes_a_fault(tmp_path: Path, row: Any, names: str) -> None:
    frame = read(tmp_path, [row]).frame
    assert frame["fault"].str.fullmatch(f"{names}.*").all()
    assert (frame["chosen"] == "").all()


def test_hpd_names_files_beside_the_data(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for i in range(3):
        (tmp_path / "train" / f"{i}.png").write_bytes(noise(i))
    paths = [f"train/{i}.png" for i in range(3)]
    rows = [
        {"prompt": "a dog", "file_path": paths[:2], "human_preference": [0, 1]},
        {"prompt": "a dog", "file_path": paths[:2], "human_preference": [0, 0]},
        {"prompt": "a dog", "file_path": ["train/9.png", "train/0.png"], "human_preference": [1, 0]},
    ]
    pd.DataFrame(rows).to_json(tmp_path / "train.json", orient="records")
    loaded = load(DataConfig(path=str(tmp_path / "train.json")))
    assert (loaded.format, loaded.notes["ties_dropped"]) == ("hpd", 1)
    assert "the image train/9.png cannot be read (No such file" in loaded.frame["fault"][1]
    assert [read_bytes(loaded.frame[s][0]) for s in ("chosen", "rejected")] == [noise(1), noise(0)]
    test = [{"prompt": "a dog", "image_path": paths, "rank": [2, 3, 1], "raw_annotations": [[1, 2, 0]]}]
    pd.DataFrame(test).to_json(tmp_path / "test.json", orient="records")
    ranked = load(DataConfig(path=str(tmp_path / "test.json"), pairs="all"))
    assert ranked.format == "hpd-ranked"
    order = {noise(2): 1, noise(0): 2, noise(1): 3}
    places = [[order[read_bytes(x)] for x in (r.chosen, r.rejected)] for r in ranked.frame.itertuples()]
    assert sorted(places) == [[1, 2], [1, 3], [2, 3]]
    assert pair_fault(ranked.frame["chosen"][0], ranked.frame["chosen"][0]) == "the two images are equal"


def test_a_diffusion_job_reads_the_images_that_rows_name(tmp_path: Path) -> None:
    class Sizes:
        def encode_prompts(self, prompts: list[str]) -> torch.Tensor:
            return torch.zeros(len(prompts), 1, 1)

        def encode_images(self, images: list[bytes]) -> torch.Tensor:
            return torch.tensor([float(sum(image)) for image in images]).reshape(-1, 1, 1, 1)

    frame = read(tmp_path, [pick_row(labels=(0, 1))]).frame
    named: Any = encode(Sizes(), frame.to_dict("records"), DiffusionConfig())  # type: ignore[arg-type]
    as_bytes = {"id": frame["id"][0], "prompt": "a dog", "chosen": noise(1), "rejected": noise(0)}
    assert named == encode(Sizes(), [as_bytes], DiffusionConfig())  # type: ignore[arg-type]
    assert named[0].latents_S[0] != named[0].latents_S[1]
