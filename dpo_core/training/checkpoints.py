"""Checkpoints of a training job: written atomically, verified by digests when loaded, the newest few kept.

A checkpoint is a folder `step-00000012` with DeepSpeed's files (one shard for each rank under ZeRO), one file
of random states for each rank, and `digest.json`: how it was made and the SHA-256 of each file. It is written
under another name and renamed, so that a kill leaves a complete checkpoint or none; later damage is detected
by the digests. All nodes must share the folder.

The files are pickles, and the digests do not prove who wrote them. They are loaded with
`restricted_unpickling`, which refuses a file that would run code.
"""

import logging
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import torch

from dpo_core.checked_json import read_checked, write_checked
from dpo_core.errors import StageFailed
from dpo_core.system import digest_file, remove, sync

log = logging.getLogger(__name__)

DIGEST = "digest.json"
CURVE = "metrics.jsonl"


@dataclass(frozen=True)
class CheckpointInfo:
    """How a checkpoint was made."""

    step: int
    """Steps done."""
    ranks: int
    """Ranks that wrote it."""
    zero_stage: int
    """Their ZeRO stage."""


class Checkpoints:
    """The checkpoints of one job. Only rank 0 may call its methods.

    Args:
        folder: their folder; created with the first one.
        keep: number of newest checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def begin(self, step: int) -> Path:
        """An empty folder to write the checkpoint of a step into; incomplete ones are removed."""
        for incomplete in self.folder.glob("tmp-*"):
            shutil.rmtree(incomplete)
        temporary = self.folder / f"tmp-step-{step:08d}"
        temporary.mkdir(parents=True)
        return temporary

    def commit(self, temporary: Path, made: CheckpointInfo) -> None:
        """Add the digests to a checkpoint that all ranks have written, rename it, and remove older ones.

        Raises:
            StageFailed: the shard of a rank is missing, so the ranks do not share the folder.
        """
        shards = len(list(temporary.glob("*zero_pp_rank_*_optim_states.pt")))
        if made.zero_stage and shards != made.ranks:
            raise StageFailed(
                f"{made.ranks} ranks wrote a checkpoint, but {self.folder} has the shards of only {shards}",
                "Put the workspace on storage that every node shares",
            )
        if self.curve.exists():
            shutil.copyfile(self.curve, temporary / CURVE)
        _write_digest(temporary, made)
        final = self.folder / f"step-{made.step:08d}"
        remove(final)
        os.replace(temporary, final)
        # A damaged checkpoint of a later step may still be there; it is removed too.
        names = sorted(self.folder.glob("step-*"))
        newest = [name for name in names if name <= final][-self.keep :]
        for name in names:
            if name not in newest:
                remove(name)

    @property
    def curve(self) -> Path:
        """The job's metrics so far. A checkpoint has a copy, because this file has no digest."""
        return self.folder.parent / CURVE

    def restore_curve(self, checkpoint: Path) -> None:
        """Restore the metrics as they were when the checkpoint was written."""
        if (checkpoint / CURVE).exists():  # older checkpoints have no copy
            shutil.copyfile(checkpoint / CURVE, self.curve)

    def newest(self) -> tuple[Path, CheckpointInfo] | None:
        """The newest undamaged checkpoint; None if none was ever written.

        Raises:
            StageFailed: every checkpoint is damaged.
        """
        damage: list[str] = []
        for folder in sorted(self.folder.glob("step-*"), reverse=True):
            try:
                made = read_digest(folder)
            except ValueError as error:
                damage.append(f"{folder.name}: {error}")
                log.warning("the checkpoint %s is damaged (%s)", folder, error)
                continue
            if damage:
                log.warning("falling back to an earlier checkpoint: %s", folder)
            return folder, made
        if damage:
            raise StageFailed(
                f"every checkpoint in {self.folder} is damaged ({'; '.join(damage)})",
                "Restore a copy of that folder, or delete it to train from the first step",
            )
        return None


def _write_digest(folder: Path, made: CheckpointInfo) -> None:
    files = {str(f.relative_to(folder)): digest_file(f) for f in sorted(folder.rglob("*")) if f.is_file()}
    write_checked(folder / DIGEST, {"made": asdict(made), "files": files})
    # Without this, a failing disk could leave empty files in a renamed checkpoint.
    for path in [*(folder / name for name in [*files, DIGEST]), folder]:
        sync(path)


def read_digest(folder: Path) -> CheckpointInfo:
    """How a checkpoint was made, after all its files were compared with their digests.

    Raises:
        ValueError: the checkpoint is damaged; the message says where.
    """
    facts = read_checked(folder / DIGEST, "another checkpoint is used", keep=True)
    if facts is None:
        raise ValueError(f"{DIGEST} is missing, cannot be read, or has changed since it was written")
    for name, digest in facts["files"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        if digest_file(folder / name) != digest:
            raise ValueError(f"{name} has changed since it was written")
    return CheckpointInfo(**facts["made"])


@contextmanager
def restricted_unpickling(folder: Path) -> Iterator[None]:
    """Let torch load only tensors, plain values and the types below, whatever DeepSpeed requests.

    Raises:
        StageFailed: a file of the checkpoint contains another object; nothing of it was run.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler  # noqa: PLC0415 - after set_accelerator
    from deepspeed.runtime.zero.config import ZeroStageEnum  # noqa: PLC0415 - after set_accelerator
    from deepspeed.utils.tensor_fragment import fragment_address  # noqa: PLC0415 - after set_accelerator

    deepspeed_types = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    # Python before 3.11.4 pickles a member of an enumeration as a call of getattr.
    members = [(_member, f"{module}.getattr") for module in ("__builtin__", "builtins")]
    generator = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, np.dtypes.UInt32DType]  # type: ignore[attr-defined]
    before = os.environ.get(_FORCED)
    os.environ[_FORCED] = "1"
    try:
        with torch.serialization.safe_globals([*deepspeed_types, *generator, *members]):
            yield
    except pickle.UnpicklingError as error:
        raise StageFailed(
            f"the checkpoint {folder} contains more than numbers, could run code and was not loaded "
            f"({_first_sentence(error)})",
            "Find out who changed it, delete it, then resume the run: training continues from an earlier "
            "checkpoint",
        ) from error
    finally:
        if before is None:
            os.environ.pop(_FORCED)
        else:
            os.environ[_FORCED] = before


def _member(kind: type, name: str) -> object:
    """Replaces getattr while a checkpoint is loaded: it returns members of enumerations only."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError("GLOBAL getattr was not an allowed global.")
    return kind[name]


# Overrides the argument of each call: DeepSpeed passes weights_only=False everywhere.
_FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def _first_sentence(error: Exception) -> str:
    sentence = re.search(r"(Unsupported|Trying to|GLOBAL)[^.]*\.?[^ ]*", str(error))
    return sentence[0] if sentence else type(error).__name__


# Random states ----------------------------------------------------------------------------------------------


def save_random_state(folder: Path, rank: int) -> None:
    """Save the states of this rank's random generators."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    torch.save(state, _random_file(folder, rank))


def load_random_state(folder: Path, rank: int) -> None:
    """Restore this rank's random generators; a rank that did not exist when they were saved keeps its own."""
    file = _random_file(folder, rank)
    if not file.exists():
        return
    with restricted_unpickling(folder):
        state = torch.load(file, weights_only=True)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _random_file(folder: Path, rank: int) -> Path:
    return folder / f"random-{rank:05d}.pt"


# Another number of ranks ------------------------------------------------------------------------------------


def to_universal(checkpoint: Path, out: Path) -> None:
    """Convert ZeRO shards into DeepSpeed's universal checkpoint, which any number of ranks can load.

    Raises:
        StageFailed: DeepSpeed's converter failed; the message has the last line of its output.
    """
    shutil.rmtree(out, ignore_errors=True)
    # The converter also reads subfolders, and the checkpoint of a critic is one: link only the files.
    links = out.with_name(f"links-{out.name}")
    shutil.rmtree(links, ignore_errors=True)
    links.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.is_file():
            (links / file.name).symlink_to(file.resolve())
    command = [sys.executable, "-P", "-m", "dpo_core.training.convert_checkpoint", "--inject_missing_state"]
    command += ["--input_folder", str(links), "--output_folder", str(out)]
    # Each worker has a copy of the state in memory; the default is one for each core.
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shutil.rmtree(links)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no error message"])[-1]
        raise StageFailed(
            f"the checkpoint {checkpoint} cannot be converted for another number of ranks: {last}",
            "Resume on the number of ranks that wrote it",
        )
