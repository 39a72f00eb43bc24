"""Files of strangers run no code: pickles, models with code, templates, data sets, checkpoints."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dpo_core.checked_json import write_checked
from dpo_core.data.files.read import read_rows
from dpo_core.errors import DataError, ModelError, StageFailed
from dpo_core.models.config import ModelConfig
from dpo_core.models.folder import check_folder, code_digest
from dpo_core.models.load import convert, load_tokenizer
from dpo_core.reference.shard import LogpShard
from dpo_core.training.checkpoints import (
    load_random_state,
    read_digest,
    restricted_unpickling,
    save_random_state,
)
from tests.support.models.tiny import make_tiny_model


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """What a payload leaves where it runs; the fixture shows that it would."""
    trace = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists()
    trace.unlink()
    return trace


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "good")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pickled(path: Path, trace: Path) -> None:
    torch.save({"lm_head.weight": Payload(trace)}, path)


# --- models -----------------------------------------------------------------------------------------------


def only_pickles(model: Path, trace: Path) -> None:
    (model / "model.safetensors").unlink()
    pickled(model / "pytorch_model.bin", trace)


def pickles_behind_another_file(model: Path, trace: Path) -> None:
    (model / "model.safetensors").rename(model / "other.safetensors")
    pickled(model / "pytorch_model.bin", trace)


def index_of(model: Path, part: str) -> None:
    names = list(load_file(model / "model.safetensors"))
    (model / "model.safetensors").rename(model / "z.safetensors")
    facts = {"metadata": {}, "weight_map": dict.fromkeys(names, part)}
    (model / "model.safetensors.index.json").write_text(json.dumps(facts))


def index_to_a_pickle(model: Path, trace: Path) -> None:
    index_of(model, "evil.bin")
    pickled(model / "evil.bin", trace)


def index_out_of_the_folder(model: Path, trace: Path) -> None:
    index_of(model, "../good/model.safetensors")


def adapter(model: Path, trace: Path) -> None:
    facts = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "/elsewhere"}
    (model / "adapter_config.json").write_text(json.dumps(facts))
    pickled(model / "adapter_model.bin", trace)


def code(model: Path, trace: Path) -> None:
    (model / "evil.py").write_text(
        f"import os\nos.system('touch {trace}')\nfrom transformers import LlamaForCausalLM, LlamaConfig\n"
        "class EvilConfig(LlamaConfig): model_type = 'evil'\n"
        "class EvilModel(LlamaForCausalLM): config_class = EvilConfig\n"
    )
    known = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    edit(model / "config.json", auto_map=known, model_type="evil")


def code_of_a_tokenizer(model: Path, trace: Path) -> None:
    code(model, trace)
    edit(model / "config.json", auto_map={}, model_type="llama")
    named = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}
    edit(model / "tokenizer_config.json", auto_map=named, tokenizer_class="EvilTokenizer")


def attention_of_the_hub(model: Path, trace: Path) -> None:
    edit(model / "config.json", attn_implementation="somebody/kernel")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (only_pickles, "only pickled weights"),
        (pickles_behind_another_file, "cannot be loaded"),
        (index_to_a_pickle, "names evil.bin, which is not a safetensors file in its folder"),
        (index_out_of_the_folder, "names ../good/model.safetensors, which is not"),
        (adapter, "holds an adapter"),
        (code, "contains custom code"),
        (code_of_a_tokenizer, "contains custom code"),
        (attention_of_the_hub, "loads code from the hub"),
    ],
)
def test_no_model_runs_code(
    change: Callable[[Path, Path], None], words: str, good: Path, trace: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(good, model)
    change(model, trace)
    config = ModelConfig(name=str(model))
    with pytest.raises(ModelError, match=words):
        convert(config, tmp_path / "out")  # begins with locate()
    assert not trace.exists()


def test_pickled_weights_beside_safetensors_are_not_read(good: Path, trace: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(good, model)
    pickled(model / "pytorch_model.bin", trace)
    convert(ModelConfig(name=str(model)), tmp_path / "out")
    assert not trace.exists()
    assert not list((tmp_path / "out").glob("*.bin"))


def test_code_runs_once_it_is_trusted_and_is_told_by_its_digest(
    good: Path, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.dynamic_module_utils as modules

    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = tmp_path / "model"
    shutil.copytree(good, model)
    assert code_digest(model) is None
    code(model, trace)
    first = code_digest(model)
    with pytest.raises(ModelError, match="contains custom code"):
        convert(ModelConfig(name=str(model)), tmp_path / "out")
    assert not trace.exists()
    convert(ModelConfig(name=str(model), trust_remote_code=True), tmp_path / "out")
    assert trace.exists()
    (model / "evil.py").write_text("# another\n" + (model / "evil.py").read_text())
    assert code_digest(model) not in (first, None)
    edit(model / "config.json", attn_implementation="somebody/kernel")
    check_folder(model, trust_remote_code=True)


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch TRACE') }}",
        "{{ self.__init__.__globals__.__builtins__.open('TRACE', 'w') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_chat_template_cannot_leave_its_sandbox(template: str, good: Path, trace: Path) -> None:
    tokenizer = load_tokenizer(good)
    tokenizer.chat_template = template.replace("TRACE", str(trace))
    with pytest.raises(Exception, match=r"unsafe|undefined|not safely callable"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert not trace.exists()


# --- data -------------------------------------------------------------------------------------------------


def test_data_in_pickles_or_scripts_are_not_read(trace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "set.py").write_text(f"import os\nos.system('touch {trace}')\n")
    for name in ("rows.pkl", "rows.pickle", "rows.pt", "rows.npy", "rows.tar.gz", "rows.zip"):
        (folder / name).write_bytes(pickle.dumps(Payload(trace)))
        with pytest.raises(DataError, match="has an unknown ending"):
            list(read_rows(str(folder / name)))
    with pytest.raises(DataError, match="no data file directly in it"):
        list(read_rows(str(folder)))
    # An ending is no proof of what is inside.
    for name in ("rows.jsonl", "rows.json", "rows.parquet", "rows.arrow", "rows.csv", "rows.jsonl.gz"):
        (tmp_path / name).write_bytes(pickle.dumps(Payload(trace), protocol=4))
        with pytest.raises(DataError):
            list(read_rows(str(tmp_path / name)))
    assert not trace.exists()


def test_a_type_of_its_own_in_arrow_is_not_unpickled(trace: Path, tmp_path: Path) -> None:
    import pyarrow as pa

    secret = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    secret[b"ARROW:extension:metadata"] = pickle.dumps(Payload(trace))
    field = pa.field("prompt", pa.string(), metadata=secret)
    table = pa.table([pa.array(["x"])], schema=pa.schema([field]))
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table)
    assert [row for _, rows in read_rows(str(tmp_path / "rows.arrow")) for row in rows] == [{"prompt": "x"}]
    assert not trace.exists()


def test_log_probs_of_the_store_hold_no_objects(trace: Path, tmp_path: Path) -> None:
    LogpShard.build({bytes(16): np.zeros(3, np.float32)}).save(tmp_path / "shard")
    for file in (tmp_path / "shard").glob("*.npy"):
        np.save(file, np.array([Payload(trace)], dtype=object), allow_pickle=True)
    with pytest.raises(StageFailed, match="is damaged"):
        LogpShard.open(tmp_path / "shard", verify=False)
    assert not trace.exists()


# --- checkpoints ------------------------------------------------------------------------------------------


def test_a_checkpoint_with_a_fitting_digest_runs_no_code(trace: Path, tmp_path: Path) -> None:
    """Whoever can write the workspace can write the digest too; it proves no origin."""
    save_random_state(tmp_path, 0)
    before = torch.rand(3)
    load_random_state(tmp_path, 0)
    assert torch.equal(torch.rand(3), before)

    torch.save({"python": Payload(trace)}, tmp_path / "random-00000.pt")
    from dpo_core.system import digest_file

    facts = {
        "made": {"step": 1, "ranks": 1, "zero_stage": 0},
        "files": {"random-00000.pt": digest_file(tmp_path / "random-00000.pt")},
    }
    write_checked(tmp_path / "digest.json", facts)
    assert read_digest(tmp_path).step == 1, "the tampered checkpoint passes for whole"
    with pytest.raises(StageFailed, match="contains more than numbers") as caught:
        load_random_state(tmp_path, 0)
    assert "posix.system" in str(caught.value), "it says what would have run"
    assert not trace.exists()
    # As DeepSpeed loads its own files.
    with pytest.raises(StageFailed), restricted_unpickling(tmp_path):
        torch.load(tmp_path / "random-00000.pt", weights_only=False)
    assert not trace.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_what_stands_in_for_getattr_reaches_members_of_enumerations_alone() -> None:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    from dpo_core.training.checkpoints import _member

    assert _member(ZeroStageEnum, "weights") is ZeroStageEnum.weights
    for kind, name in ((object, "__subclasses__"), (os, "system"), (ZeroStageEnum, "__class__")):
        with pytest.raises((pickle.UnpicklingError, KeyError)):
            _member(kind, name)  # type: ignore[arg-type]
