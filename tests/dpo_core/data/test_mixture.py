"""Mixtures of several data sets, and folders with files of several splits."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from dpo_core.data.config import DataConfig
from dpo_core.data.files.read import check_source, read_rows
from dpo_core.data.load import load
from dpo_core.data.split import by_source, split_table
from dpo_core.errors import DataError
from tasks.stages.data import source_digests


def _pairs(path: Path, name: str, count: int) -> str:
    rows = [{"prompt": f"{name} {i}", "chosen": "a", "rejected": "b"} for i in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _mixture(folder: Path, *weights: float | None, **settings: object) -> DataConfig:
    sets = [
        {"path": _pairs(folder / f"{name}.jsonl", name, count), "weight": weight}
        for (name, count), weight in zip({"x": 40, "y": 100, "z": 10}.items(), weights, strict=False)
    ]
    return DataConfig(mixture=sets, **settings)  # type: ignore[arg-type]


def _counts(config: DataConfig) -> list[int]:
    frame = load(config).frame
    return [int((frame["source"] == source.path).sum()) for source in config.mixture or ()]


def test_without_weights_all_rows_of_all_sets(tmp_path: Path) -> None:
    config = _mixture(tmp_path, None, None, None)
    loaded = load(config)
    assert _counts(config) == [40, 100, 10]
    assert list(loaded.frame["row"]) == list(range(1, 151))  # one number, one row of one set
    assert loaded.notes["rows_read"] == 150
    assert loaded.remarks[1] == f"rows 41 to 140 are those of {tmp_path}/y.jsonl (prompt-pairs)"


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ((1, 1, 1), [10, 10, 10]),
        ((4, 10, 1), [40, 100, 10]),
        ((0.2, 0.7, 0.1), [20, 70, 10]),
        ((3, 1, 0.5), [40, 13, 6]),
    ],
)
def test_weights_are_shares_and_no_row_repeats(tmp_path: Path, weights: tuple, counts: list[int]) -> None:
    config = _mixture(tmp_path, *weights)
    assert _counts(config) == counts
    frame = load(config).frame
    assert not frame.duplicated(["source", "row"]).any()
    assert frame.equals(load(config).frame)
    other = load(config.model_copy(update={"seed": 1})).frame
    assert other.equals(frame) == (counts == [40, 100, 10])


def test_limits_of_a_set_and_of_the_mixture(tmp_path: Path) -> None:
    config = _mixture(tmp_path, None, None)
    assert config.mixture is not None
    config.mixture[1] = config.mixture[1].model_copy(update={"limit": 7})
    assert _counts(config) == [40, 7]
    assert load(config).notes["left_by_limit"] == 93
    assert sum(_counts(config.model_copy(update={"limit": 12}))) == 12


def test_rows_are_counted_by_set_and_side(tmp_path: Path) -> None:
    config = _mixture(tmp_path, None, None, eval_fraction=0.3)
    frame = split_table(load(config), config)
    counts = by_source(frame)
    assert [sum(count.values()) for count in counts.values()] == [40, 100]
    assert all(count["eval"] for count in counts.values())
    held_out = _pairs(tmp_path / "held_out.jsonl", "h", 5)
    config = _mixture(tmp_path, None, None, eval_path=held_out)
    assert by_source(split_table(load(config), config))[held_out] == {"train": 0, "eval": 5}


def test_the_same_prompt_of_two_sets_is_on_one_side(tmp_path: Path) -> None:
    paths = [_pairs(tmp_path / f"{name}.jsonl", "same", 50) for name in "ab"]
    config = DataConfig(mixture=[{"path": path} for path in paths])  # type: ignore[list-item]
    frame = split_table(load(config), config)
    assert (frame.groupby("prompt")["split"].nunique() == 1).all()


def test_sets_of_different_kinds_are_refused(tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "x"}\n')
    config = DataConfig(mixture=[{"path": _pairs(tmp_path / "a.jsonl", "a", 3)}, {"path": str(prompts)}])  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"differ in kind: .*a\.jsonl has pairs, .*p\.jsonl has"):
        load(config)
    with pytest.raises(DataError, match=r"no row of .*z\.jsonl would be used"):
        load(_mixture(tmp_path, 1, 1, 0.001))


def test_every_file_of_a_mixture_is_in_the_stages_key(tmp_path: Path) -> None:
    config = _mixture(tmp_path, None, None, eval_path=_pairs(tmp_path / "e.jsonl", "e", 3))
    digests = source_digests(config)
    assert sorted(Path(name).name for name in digests) == ["e.jsonl", "x.jsonl", "y.jsonl"]
    _pairs(tmp_path / "y.jsonl", "other", 100)
    assert source_digests(config) != digests


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"path": "x", "mixture": [{"path": "y"}]}, "two are set"),
        ({"mixture": []}, "at least 1 item"),
        ({"mixture": [{"path": "x"}], "format": "hh"}, "data.format has no effect, because each set"),
        ({"mixture": [{"path": "x"}], "split": "test"}, "data.split has no effect"),
        ({"mixture": [{"path": "x", "weight": 1}, {"path": "y"}]}, "set a weight for all sets"),
        ({"mixture": [{"path": "x", "weight": 0}]}, "greater than 0"),
        ({"mixture": [{"path": "x", "wight": 1}]}, "Extra inputs are not permitted"),
        ({"path": "x", "columns": {"promt": "ask"}}, "'prompt'"),
        ({"path": "x", "eval_split": "test"}, "data.eval_split has no effect"),
        ({"openings": 4, "columns": {"prompt": "ask"}}, "data.columns has no effect"),
        ({"openings": 4, "pairs": "all"}, "data.pairs has no effect"),
    ],
)
def test_settings_that_would_not_be_read(settings: dict, why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        DataConfig(**settings)


# --- splits -----------------------------------------------------------------------------------------------

CLONES: dict[str, tuple[dict[str, int], str | None, int, str]] = {
    # files with their rows, data.split, rows that are read, what is said
    "parquet shards": (
        {"data/train-00000-of-00002.jsonl": 5, "data/train-00001-of-00002.jsonl": 4, "data/test-0.jsonl": 2},
        None, 9, "the split train was read (2 files); not read: test",
    ),
    "shards with a digest": (
        {"data/train-00000-of-00001-0a1b2c3d4e5f.jsonl": 5, "data/test-00000-of-00001-0f1e2d3c4b5a.jsonl": 2},
        "test", 2, "the split test was read",
    ),
    "preferences among others": (
        {f"data/{name}-00000-of-00001.jsonl": count for name, count in
         {"train_prefs": 5, "train_sft": 7, "train_gen": 8, "test_prefs": 2, "test_sft": 3}.items()},
        None, 5, "the split train_prefs was read (1 files); not read: test_prefs, test_sft, train_gen",
    ),
    "files beside each other": (
        {"train.jsonl": 5, "validation.jsonl": 3, "test.jsonl": 2}, "validation", 3, "not read: test, train",
    ),
    "folders": ({"train/0000.jsonl": 5, "test/0000.jsonl": 2}, None, 5, "the split train was read"),
    "the split last": ({"helpful-base-train.jsonl": 5, "helpful-base-test.jsonl": 2}, "test", 2, ""),
    "a held-out file beside others": (
        {"rows.jsonl": 5, "more.jsonl": 1, "dev.jsonl": 2}, None, 6, "not read: dev",
    ),
    "no splits": ({"a.jsonl": 5, "latest.jsonl": 2}, None, 7, ""),
    "one split": ({"test-00000-of-00002.jsonl": 5, "test-00001-of-00002.jsonl": 2}, None, 7, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", CLONES)
def test_splits_of_a_folder(tmp_path: Path, case: str) -> None:
    files, split, rows, remark = CLONES[case]
    for name, count in files.items():
        _pairs(tmp_path / name, name, count)
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / ".git").mkdir()
    remarks: list[str] = []
    chunks = list(read_rows(str(tmp_path), split, remarks=remarks))
    assert sum(len(chunk) for _, chunk in chunks) == rows
    assert remark in "; ".join(remarks)
    assert bool(remarks) == (len(files) > 1 and case not in ("no splits", "one split"))
    check_source(str(tmp_path))


def test_a_split_that_is_not_there_or_not_certain(tmp_path: Path) -> None:
    for kind in ("sft", "gen"):
        _pairs(tmp_path / f"train_{kind}-00000-of-00001.jsonl", kind, 3)
    with pytest.raises(DataError, match=r"no split is set; the files have the splits train_gen, train_sft"):
        list(read_rows(str(tmp_path)))
    with pytest.raises(DataError, match="there is no split test"):
        list(read_rows(str(tmp_path), "test"))
    path = _pairs(tmp_path / "alone.jsonl", "x", 3)
    with pytest.raises(DataError, match=r"there is no split test in .*alone\.jsonl"):
        load(DataConfig(path=path, split="test"))


def test_the_held_out_side_takes_the_held_out_split(tmp_path: Path) -> None:
    _pairs(tmp_path / "train.jsonl", "a", 6)
    _pairs(tmp_path / "test.jsonl", "b", 2)
    _pairs(tmp_path / "validation.jsonl", "c", 3)
    for split, rows in {None: 2, "validation": 3}.items():
        config = DataConfig(path=str(tmp_path), eval_path=str(tmp_path), eval_split=split)
        frame = split_table(load(config), config)
        assert frame["split"].value_counts().to_dict() == {"train": 6, "eval": rows}


def test_splits_in_a_column(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows = [
        {"prompt": f"p{i}", "chosen": "a", "rejected": "b", "split": "val" if i > 6 else "train"}
        for i in range(9)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = load(DataConfig(path=str(path))).remarks
    assert said == [
        "the column split was not read; rows of all splits were kept: train (7 rows), val (2 rows)"
    ]
    loaded = load(DataConfig(path=str(path), split="val"))
    assert list(loaded.frame["row"]) == [8, 9]
    assert loaded.notes["of_other_splits"] == 7
