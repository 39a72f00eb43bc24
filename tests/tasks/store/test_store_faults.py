"""The store under kills, concurrent processes and disk errors, with real files and processes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dpo_core.errors import RecipeError, StageFailed
from tasks.store.manifest import stage_key
from tasks.store.store import Store
from tests.support.runs.stored import CONFIG, INFO, KEY, REPO, assert_clean, make, python, write

COMMIT_FOREVER = """
import os, sys
from pathlib import Path
from dpo_core.system import digest_json
from tasks.store.manifest import stage_key
from tasks.store.store import ArtifactInfo, Store
store, number = Store(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
while True:
    number += 1
    key = stage_key("sft", number, "c" * 64, [])
    with store.lock("sft", key):
        if store.lookup("sft", key): continue
        folder = store.begin("sft", key) / "artifact"
        folder.mkdir(exist_ok=True)
        for name in "abcd":
            (folder / name).write_bytes(os.urandom(300_000))
        store.commit("sft", key, folder, ArtifactInfo("model", number, "c" * 64))
"""


def test_kill_at_any_moment_leaves_whole_artifacts_or_none(tmp_path: Path) -> None:
    store, chance, swept = Store(tmp_path), random.Random(1), 0
    for kill in range(12):
        process = python(COMMIT_FOREVER, tmp_path, kill * 10_000)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if kill % 3 == 0:
            time.sleep(chance.uniform(0, 0.15))
        while kill % 3 == 1 and not list((store.root / "objects").glob("*/*/*")):  # it has stored something
            time.sleep(0.01)
        while kill % 3 == 2 and not list((store.root / "tmp").glob("*")):  # it is in the middle of a commit
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        swept += len(store.leftovers())
        store.sweep()
        assert_clean(store)
    assert list((store.root / "objects").glob("*/*/*")), "the kills came too early to show anything"
    assert swept, "no kill came in the middle of a commit"


def test_sweep_spares_the_living(tmp_path: Path) -> None:
    store = Store(tmp_path)
    make(store, {"f": b"1"})
    with store.temporary() as mine:
        owner, _, born, _ = mine.name.split("+")
        dead = [
            f"{owner}+{os.getpid()}+{int(born) - 500}+reused",
            f"{owner}+4194999+{born}+gone",
            "tmp-rubbish",
        ]
        for name in [*dead, f"tmp-elsewhere+1+{born}+new"]:
            (mine.parent / name).mkdir()
        old = mine.parent / f"tmp-elsewhere+1+{born}+old"
        old.mkdir()
        os.utime(old, (1e9, 1e9))
        store.sweep()
        assert sorted(path.name for path in mine.parent.iterdir()) == sorted(
            [mine.name, f"tmp-elsewhere+1+{born}+new"]
        )


SWEEP = "import sys; from tasks.store.store import Store; print(len(Store(sys.argv[1]).leftovers()))"


def test_sweep_spares_the_living_when_the_clock_was_set(tmp_path: Path) -> None:
    """What it changes for a process: the time of day at which the machine was started, and so all births."""
    kernel = Path("/proc/stat").read_text()
    booted = int(next(line.split()[1] for line in kernel.splitlines() if line.startswith("btime")))
    (tmp_path / "stat").write_text(kernel.replace(f"btime {booted}", f"btime {booted - 3600}"))
    store = Store(tmp_path)
    inside = f'mount --bind {tmp_path}/stat /proc/stat && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", inside, "sh", sys.executable, "-c", SWEEP, str(tmp_path)]
    with store.temporary() as mine:
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
        if "mount:" in done.stderr or "unshare:" in done.stderr:
            pytest.skip("no mount namespace can be made here")
        assert done.stdout == "0\n", done.stderr
        assert mine.exists()


RIVAL = """
import sys, time, logging
from pathlib import Path
from tasks.store.store import ArtifactInfo, Store
# As the command line shows it: of `dpo` what it tells, of the rooms only warnings.
logging.basicConfig(level="WARNING", stream=sys.stdout, format="%(message)s")
logging.getLogger("dpo").setLevel("INFO")
store, key, locked, seed = Store(sys.argv[1]), sys.argv[2], sys.argv[3] == "lock", sys.argv[4]
about = ArtifactInfo("model", 1, "c" * 64)
print("ready", flush=True)
sys.stdin.readline()
def work(text):
    store.begin("sft", key)
    source = Path(sys.argv[1]) / f"source-{seed}"
    source.mkdir(exist_ok=True)
    for name in "abcdef":
        (source / name).write_text(text * 100_000)
    return store.commit("sft", key, source, about)
if locked:
    with store.lock("sft", key):
        if store.lookup("sft", key) is None:
            print("worked", flush=True)
            time.sleep(1)
            work("x")
else:
    for turn in range(15):
        work("x" if turn % 3 else seed)
        store.lookup("sft", key)
"""


def race(workspace: Path, how: str) -> list[str]:
    rivals = [python(RIVAL, workspace, KEY, how, seed, stdin=subprocess.PIPE) for seed in range(3)]
    for rival in rivals:
        assert rival.stdout is not None
        assert rival.stdout.readline() == "ready\n"
    for rival in rivals:
        assert rival.stdin is not None
        rival.stdin.write("\n")
        rival.stdin.flush()
    outputs = [rival.communicate(timeout=600)[0] for rival in rivals]
    assert [rival.returncode for rival in rivals] == [0, 0, 0]
    return outputs


def test_of_rivals_with_the_lock_one_works_and_the_others_are_told_who(tmp_path: Path) -> None:
    outputs = race(tmp_path, "lock")
    assert "".join(outputs).count("worked") == 1
    waiting = [output for output in outputs if "worked" not in output]
    assert all(f"stage sft (key {KEY[:16]}), which is in progress: process " in output for output in waiting)
    assert Store(tmp_path).lookup("sft", KEY)
    assert_clean(Store(tmp_path))


def test_rivals_without_the_lock_corrupt_nothing(tmp_path: Path) -> None:
    outputs = race(tmp_path, "free")
    assert not any("damaged" in output for output in outputs)
    assert Store(tmp_path).lookup("sft", KEY)
    assert_clean(Store(tmp_path))


@contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder and a user that is bound by permissions, which root is not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    if os.getuid() == 0:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        shutil.rmtree(folder, ignore_errors=True)


def test_no_permission_names_the_path_and_the_remedy() -> None:
    with unprivileged() as folder:
        if os.getuid() != 0:
            folder.chmod(0o555)
        for call in (lambda s: s.begin("sft", KEY), lambda s: s.lock("sft", KEY).__enter__()):
            with pytest.raises(RecipeError, match=str(folder)) as caught:
                call(Store(folder / "w"))
            assert "workspace" in caught.value.remedy
        with pytest.raises(RecipeError, match="no access"):
            Store(folder / "w").commit("sft", KEY, {"f": REPO / "LICENSE"}, INFO)
        assert Store(folder / "w").lookup("sft", KEY) is None
        Store(folder / "w").sweep()
        assert not (folder / "w").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here (needs root and mount permission)")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_leaves_nothing_half_written(small_disk: Path, tmp_path: Path) -> None:
    store = Store(small_disk)
    make(store, {"small": b"1"})
    big = write(tmp_path / "big", {"a": bytes(400_000), "b": bytes(900_000)})
    other = stage_key("sft", 9, CONFIG, [])
    with pytest.raises(StageFailed, match="full") as caught:
        store.commit("sft", other, big, INFO)
    assert str(small_disk) in caught.value.problem
    assert "Free some space" in caught.value.remedy
    assert store.lookup("sft", other) is None
    assert store.lookup("sft", KEY) is not None
    assert_clean(store)
    (big / "b").unlink()
    store.commit("sft", other, big, INFO)
    assert_clean(store)


def test_read_only_disk_can_be_read(small_disk: Path) -> None:
    store = Store(small_disk)
    manifest = make(store, {"f": b"1"})
    broken = make(store, {"f": b"2"}, stage="broken")
    (broken.path / "f").write_bytes(b"3")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert store.lookup("sft", KEY) == manifest
    assert store.lookup("broken", KEY) is None
    with pytest.raises(StageFailed, match="is read-only") as caught:
        make(store, {"f": b"4"}, stage="new")
    assert "resume the run" in caught.value.remedy
