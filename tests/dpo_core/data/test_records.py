"""Canonical tables: real files with known defects, ids, faults, limits, custom columns."""

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from dpo_core.data.config import DataConfig
from dpo_core.data.layouts.fields import PairFields, PromptFields, Unpaired
from dpo_core.data.load import load, load_eval
from dpo_core.data.records import PAIR_COLUMNS, PROMPT_COLUMNS, UNPAIRED_COLUMNS, Loaded, record_id, to_frame
from dpo_core.errors import DataError


def _load(shared: Path, name: str, **more: object) -> Loaded:
    return load(DataConfig(path=str(shared / "data" / name), **more))  # type: ignore[arg-type]


def test_hh(shared: Path) -> None:
    loaded = _load(shared, "preference/hh_harmless_base_test.jsonl.gz")
    frame = loaded.frame
    assert (loaded.format, loaded.kind) == ("hh", "pairs")
    assert loaded.notes == {"rows_read": 2312, "ties_dropped": 0, "faults": 5}
    assert list(frame.columns) == PAIR_COLUMNS
    bad = frame[frame["fault"] != ""]
    assert list(bad["row"]) == [1255, 1689, 1951, 1953, 2037]
    assert (bad["prompt"] + bad["chosen"] + bad["rejected"] == "").all()
    good = frame[frame["fault"] == ""]
    assert good["prompt"].str.endswith("\n\nAssistant:").all()
    assert good["prompt"].str.startswith("\n\nHuman:").all()
    assert not frame["chat"].any()
    assert frame["chosen_ended"].all()
    assert frame["rejected_ended"].all()
    empty = (good["chosen"].str.strip() == "").sum() + (good["rejected"].str.strip() == "").sum()
    assert empty == 4
    assert len(good) - good["prompt"].nunique() == 2
    assert (good["prompt"].str.count("\n\nHuman:") == 1).sum() == 662 - 1  # one has a fault
    # Nothing is lost: the pieces make the transcripts again.
    import gzip

    with gzip.open(shared / "data/preference/hh_harmless_base_test.jsonl.gz", "rt", newline="\n") as lines:
        first = json.loads(next(lines))
    assert frame["prompt"][0] + frame["chosen"][0] == first["chosen"]
    assert frame["prompt"][0] + frame["rejected"][0] == first["rejected"]


def test_pandalm(shared: Path) -> None:
    loaded = _load(shared, "preference/pandalm_human_testset.json.gz")
    frame = loaded.frame
    assert loaded.format == "pandalm"
    assert loaded.notes == {"rows_read": 999, "ties_dropped": 105, "faults": 6}
    assert len(frame) == 894
    assert list(frame.loc[frame["fault"] != "", "row"]) == [158, 159, 160, 162, 163, 165]
    assert set(frame.loc[frame["fault"] != "", "fault"]) == {
        "response1 is a JSON boolean, not a string",
        "response2 is a JSON boolean, not a string",
    }
    votes = frame.loc[frame["fault"] == "", "agreement"]
    assert set(votes.round(3)) == {1.0, 0.667}
    assert int((votes == 1.0).sum()) == 426 + 368 - 2  # two of the unanimous rows have a fault
    good = frame[frame["fault"] == ""]
    assert int(good["id"].duplicated().sum()) == int(good.duplicated(["prompt", "chosen", "rejected"]).sum())
    assert good["id"].duplicated().any()


def test_sharegpt(shared: Path) -> None:
    loaded = _load(shared, "preference/llamafactory_dpo_en_demo.json.gz")
    assert loaded.format == "sharegpt"
    assert loaded.notes == {"rows_read": 300, "ties_dropped": 0, "faults": 0}
    turns = [json.loads(prompt) for prompt in loaded.frame["prompt"]]
    assert sum(messages[0]["role"] == "system" for messages in turns) == 80
    assert {messages[-1]["role"] for messages in turns} == {"user"}
    assert max(len(messages) for messages in turns) <= 13
    assert loaded.frame["chat"].all()
    assert int(loaded.frame["id"].duplicated().sum()) == 5


def test_kto(shared: Path) -> None:
    loaded = _load(shared, "preference/llamafactory_kto_en_demo.json.gz")
    assert (loaded.format, loaded.kind) == ("kto", "unpaired")
    assert list(loaded.frame.columns) == UNPAIRED_COLUMNS
    assert len(loaded.frame) == 300
    assert int(loaded.frame["label"].sum()) == 150
    assert loaded.frame["ended"].all()
    assert (loaded.frame["completion"].str.len() > 0).all()


def test_stackexchange(shared: Path) -> None:
    loaded = _load(shared, "preference/stack_exchange_paired_tiny.json.gz")
    assert (loaded.format, len(loaded.frame)) == ("stackexchange", 25)
    assert loaded.frame["prompt"].nunique() == 8


def test_prompt_pairs(shared: Path) -> None:
    loaded = _load(shared, "preference/hhh_alignment.jsonl.gz")
    assert (loaded.format, len(loaded.frame), loaded.notes["faults"]) == ("prompt-pairs", 221, 0)
    assert loaded.frame["prompt"].nunique() == 102


@pytest.mark.parametrize(("name", "rows"), [("xstest_prompts.csv", 450), ("safe_rlhf_problem.json", 83)])
def test_prompts(shared: Path, name: str, rows: int) -> None:
    loaded = _load(shared, f"safety/{name}")
    assert (loaded.format, loaded.kind) == ("prompts", "prompts")
    assert list(loaded.frame.columns) == PROMPT_COLUMNS
    assert len(loaded.frame) == rows
    assert (loaded.frame["prompt"].str.len() > 0).all()


def test_a_file_without_preferences_is_refused_by_name(shared: Path) -> None:
    with pytest.raises(
        DataError, match=r"gsm8k_test\.jsonl\.gz: the rows fit no known format.*question \(string\)"
    ):
        _load(shared, "eval/gsm8k_test.jsonl.gz")


def test_two_lines_of_a_user(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '{"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "A chair."}\n'
        '{"prompt": "Name a color.", "chosen": "Blue.", "rejected": "Monday."}\n'
    )
    loaded = load(DataConfig(path=str(path)))
    assert loaded.recognised_by.startswith("2 of the first 2 rows are prompt-pairs")
    assert loaded.frame.drop(columns="id").to_dict("records") == [
        {
            "row": row,
            "prompt": prompt,
            "chat": False,
            "chosen": chosen,
            "rejected": rejected,
            "chosen_ended": True,
            "rejected_ended": True,
            "agreement": pytest.approx(math.nan, nan_ok=True),
            "tools": "",
            "answer_chat": False,
            "margin": pytest.approx(math.nan, nan_ok=True),
            "source": "",
            "fault": "",
        }
        for row, prompt, chosen, rejected in [
            (1, "Name a fruit.", "An apple.", "A chair."),
            (2, "Name a color.", "Blue.", "Monday."),
        ]
    ]
    assert {name: str(kind) for name, kind in loaded.frame.dtypes.items()} == {
        **dict.fromkeys(["id", "prompt", "chosen", "rejected", "tools", "source", "fault"], "string"),
        **dict.fromkeys(["chat", "chosen_ended", "rejected_ended", "answer_chat"], "bool"),
        "row": "int64",
        "agreement": "float64",
        "margin": "float64",
    }


def test_bad_rows_stay_with_their_fault(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    good = '{"prompt": "p", "chosen": "c", "rejected": "r"}\n'
    bad = '{"prompt": "p", "chosen": "\\ud83d", "rejected": "r"}\n'
    bad += '{"prompt": "p", "chosen": 1, "rejected": "r"}\n'
    path.write_text(good + bad + good)
    loaded = load(DataConfig(path=str(path)))
    assert list(loaded.frame["fault"]) == [
        "",
        "a text holds half of a surrogate pair (invalid Unicode)",
        "chosen is a JSON number, not a string",
        "",
    ]
    assert list(loaded.frame["chosen"]) == ["c", "", "", "c"]
    assert loaded.notes["faults"] == 2


def test_csv_rows_of_the_wrong_width_are_faults(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("prompt,chosen,rejected\np,c,r\np,c\np,c,r,more\n")
    assert list(load(DataConfig(path=str(path))).frame["fault"]) == [
        "",
        "rejected is missing",
        "the row has more fields than the header",
    ]


def test_a_format_that_is_set_is_not_questioned(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "p", "chosen": "c", "rejected": "r", "completion": "c", "label": true}\n')
    with pytest.raises(DataError, match="several formats"):
        load(DataConfig(path=str(path)))
    loaded = load(DataConfig(path=str(path), format="kto"))
    assert (loaded.kind, loaded.recognised_by) == ("unpaired", "the recipe set data.format")
    assert load(DataConfig(path=str(path), format="hh")).notes["faults"] == 1


def test_limit_is_a_seeded_sample_in_file_order(shared: Path) -> None:
    name = "preference/hh_harmless_base_test.jsonl.gz"
    one = _load(shared, name, limit=50)
    assert one.notes["left_by_limit"] == 2312 - 50
    assert len(one.frame) == 50
    assert one.frame["row"].is_monotonic_increasing
    assert one.frame["row"].max() > 1000  # not the head of the file
    assert one.frame.equals(_load(shared, name, limit=50).frame)
    assert not one.frame.equals(_load(shared, name, limit=50, seed=1).frame)


def test_eval_path_is_read_in_full(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(f'{{"text": "{n}"}}\n' for n in range(9)))
    config = DataConfig(path=str(path), eval_path=str(path), limit=3)
    held_out = load_eval(config)
    assert held_out is not None
    assert (len(load(config).frame), len(held_out.frame)) == (3, 9)
    assert load_eval(DataConfig(path=str(path))) is None


def test_openings_instead_of_a_path() -> None:
    loaded = load(DataConfig(openings=20, seed=3))
    assert (loaded.kind, len(loaded.frame), loaded.frame["prompt"].nunique()) == ("prompts", 20, 20)
    assert list(loaded.frame["row"]) == list(range(1, 21))


def test_id_is_of_the_content_alone(tmp_path: Path) -> None:
    pair = PairFields("p", False, "c", "r")
    assert record_id(pair) == record_id(pair._replace(agreement=0.5, fault=""))
    others = [
        pair._replace(prompt="pc", chosen=""),
        pair._replace(prompt="", chosen="pc"),
        pair._replace(chosen="cr", rejected=""),
        pair._replace(chosen="r", rejected="c"),
        pair._replace(chat=True),
        pair._replace(chosen_ended=False),
        pair._replace(rejected_ended=False),
        Unpaired("p", False, "c", True),
        Unpaired("p", False, "c", False),
        PromptFields("p", False),
    ]
    ids = [record_id(record) for record in [pair, *others]]
    assert len(set(ids)) == len(ids)
    assert all(len(digest) == 64 for digest in ids)
    path = tmp_path / "x.jsonl"
    path.write_text('\n{"rejected": "r", "extra": 1, "chosen": "c", "prompt": "p"}\n')
    assert list(load(DataConfig(path=str(path))).frame["id"]) == [ids[0]] == list(to_frame([pair])["id"])


def test_no_records_make_an_empty_table() -> None:
    assert list(to_frame([]).columns) == PAIR_COLUMNS
    assert len(to_frame([])) == 0


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, "none is set"),
        ({"path": "x", "openings": 5}, "two are set"),
        ({"openings": 5, "limit": 3}, "data.limit has no effect"),
        ({"openings": 5, "format": "hh"}, "data.format has no effect"),
        ({"path": "x", "eval_path": "y", "eval_fraction": 0.2}, "data.eval_fraction has no effect"),
        ({"path": "x", "eval_fraction": 1.0}, "less than 1"),
        ({"path": "x", "format": "hhh"}, "'prompt-pairs'"),
        ({"path": "x", "pth": "y"}, "Extra inputs are not permitted"),
    ],
)
def test_config_refuses_with_the_reason(settings: dict, why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        DataConfig(**settings)
