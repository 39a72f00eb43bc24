"""Cache of replies by content: found again, complete or absent."""

from pathlib import Path
from typing import Any

import pytest

from dpo_core.checked_json import write_checked
from dpo_core.errors import StageFailed
from dpo_core.judging.cache import Reply, ReplyCache, question_key

REPLY = Reply(text="Preferred: A — “é”", tokens_in=3, tokens_out=1)


def only_file(folder: Path) -> Path:
    [path] = [path for path in folder.rglob("*") if path.is_file()]
    return path


def test_a_reply_is_found_by_its_question_alone(tmp_path: Path) -> None:
    question: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "\ud800 é"}]}
    key = question_key(question)
    assert key == question_key(dict(reversed(question.items())))
    others = [question | {"model": "n"}, question | {"messages": []}, question | {"temperature": 0}]
    assert len({key, *map(question_key, others)}) == 4
    cache = ReplyCache(tmp_path / "new" / "cache")
    assert cache.get(key) is None
    cache.put(key, REPLY)
    assert ReplyCache(tmp_path / "new" / "cache").get(key) == REPLY
    assert cache.get(question_key(others[0])) is None


def test_replies_stay_found_by_the_keys_of_earlier_versions() -> None:
    digest = "5483e6cf5147dc06484b21671d5eda71891b83cfc95a6fbbc8c8d0ae7aaf4561"
    assert question_key({"model": "m", "messages": []}) == digest


@pytest.mark.parametrize(
    "entry", [{"key": "k" * 64, "reply": {"words": "A"}}, {"key": "k" * 64}, {"x": 1}, [1]]
)
def test_a_reply_of_another_version_counts_as_absent(tmp_path: Path, entry: Any) -> None:
    cache, key = ReplyCache(tmp_path), "k" * 64
    cache.put(key, REPLY)
    write_checked(only_file(tmp_path), entry)
    assert cache.get(key) is None


def test_nothing_is_kept_without_a_folder() -> None:
    cache = ReplyCache(None)
    cache.put("k" * 64, REPLY)
    assert cache.get("k" * 64) is None


def truncated(content: bytes) -> bytes:
    return content[:-9]


def edited(content: bytes) -> bytes:
    return content.replace(b"Preferred: A", b"Preferred: B")


@pytest.mark.parametrize(
    "damage",
    [truncated, edited, lambda c: b"", lambda c: b"\xff" + c, lambda c: b'{"key": 1}'],
)
def test_a_damaged_entry_counts_as_absent_and_is_replaced(tmp_path: Path, damage: Any) -> None:
    cache, key = ReplyCache(tmp_path), "k" * 64
    cache.put(key, REPLY)
    path = only_file(tmp_path)
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert cache.get(key) is None
    cache.put(key, REPLY)
    assert cache.get(key) == REPLY


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StageFailed, match=r"cannot be stored in .*taken") as caught:
        ReplyCache(tmp_path / "taken").put("k" * 64, REPLY)
    assert "earlier replies are kept" in caught.value.remedy
