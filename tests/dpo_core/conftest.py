"""The tiny model, its tokenizer, and a process group of one for trainers that run inside the test process."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_core.models.load import load_model, load_tokenizer
from tests.support.models.tiny import make_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint folder of a random two-layer Llama; read it, never write to it."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tokenizer(tiny: Path) -> Any:
    """A byte-level tokenizer without a begin token, whose pad id is its end-of-sequence id."""
    return load_tokenizer(tiny)


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """The checkpoint folder of stories260K, whose tokenizer has a begin token and no chat template."""
    folder = shared / "models" / "stories260K"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"the model stories260K is not at {folder}")
    return folder


@pytest.fixture
def model(tiny: Path) -> Any:
    """The tiny model in fp32 and eval mode, fresh for each test."""
    return load_model(tiny)


@pytest.fixture(scope="session")
def _process_group() -> Iterator[None]:
    import torch

    from dpo_core.training.config import EngineConfig
    from dpo_core.training.distributed import start_distributed

    before, threads = dict(os.environ), torch.get_num_threads()
    start_distributed(EngineConfig(threads=1))
    # What it sets describes this process; children of later tests must not inherit it.
    os.environ.clear()
    os.environ.update(before)
    yield
    torch.distributed.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.fixture
def alone(_process_group: None) -> Iterator[None]:
    """Trainers may be built in this process; the signal handlers that they install are taken off again."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
