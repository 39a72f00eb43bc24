"""Python code of models: trusted once by digest, then accepted in every place that reads the model."""

import json
from pathlib import Path

import pytest
import torch

from dpo_core import job as train
from dpo_core.errors import ModelError
from dpo_core.models import remote_code
from dpo_core.models.config import ModelConfig
from dpo_core.models.load import config_in, convert, load_model
from dpo_core.models.reward_model import RewardModel
from dpo_core.reference.logps import attention_of
from dpo_core.scoring.attention import trunk_of
from dpo_core.scoring.model_shape import shape_of_config
from tests.support.models.families import with_own_code
from tests.support.models.tiny import make_tiny_model
from tests.support.runs.training_jobs import sft_job


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama whose classes come as a file beside its weights, in a process that trusts nothing yet."""
    import transformers.dynamic_module_utils as modules

    monkeypatch.setattr(modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(remote_code, "_trusted", set())

    def asked(*_: object) -> str:
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr("builtins.input", asked)
    return with_own_code(make_tiny_model(tmp_path / "own"))


def test_without_trust_it_is_refused_in_every_place(own: Path) -> None:
    """And nobody is asked, though transformers would."""
    for read in (load_model, config_in, attention_of, lambda f: convert(ModelConfig(name=str(f)), f / "out")):
        with pytest.raises(ModelError, match="contains custom code"):
            read(own)


def test_what_was_imported_is_read_everywhere_and_keeps_its_code(own: Path, tmp_path: Path) -> None:
    out = tmp_path / "imported"
    convert(ModelConfig(name=str(own), trust_remote_code=True), out)
    model = load_model(out)
    assert type(model).__name__ == "OwnForCausalLM"
    assert (out / "modeling_own.py").read_bytes() == (own / "modeling_own.py").read_bytes()
    assert attention_of(out) == "sdpa"
    assert shape_of_config(config_in(out)).parameters == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        reward = RewardModel(trunk_of(model))
        inputs = torch.tensor([[5, 6, 7]]), torch.ones(1, 3), torch.tensor([2])
        reward.save(tmp_path / "reward")
        again = RewardModel.load(tmp_path / "reward")
        assert torch.equal(again(*inputs), reward.eval()(*inputs))
        assert type(again.backbone).__name__ == "OwnModel"


def test_a_job_is_handed_what_is_trusted_and_writes_it(alone: None, own: Path, tmp_path: Path) -> None:
    path = sft_job(tmp_path / "job", own)
    assert train.main(["--config", str(path)]) == 2, "nothing is trusted"
    assert "contains custom code" in json.loads((tmp_path / "job" / "error.json").read_text())["problem"]
    remote_code.trust(own)
    job = json.loads(path.read_text()) | {"trusted_code": remote_code.trusted_digests()}
    remote_code._trusted.clear()
    path.write_text(json.dumps(job))
    assert train.main(["--config", str(path)]) == 0
    assert type(load_model(tmp_path / "job" / "out")).__name__ == "OwnForCausalLM"


def test_other_code_is_not_trusted(own: Path, tmp_path: Path) -> None:
    remote_code.trust(own)
    assert remote_code.is_trusted(own)
    assert not remote_code.is_trusted(make_tiny_model(tmp_path / "plain")), "there is nothing to trust"
    facts = json.loads((own / "config.json").read_text())
    facts["auto_map"]["AutoModelForCausalLM"] = "somebody/else--modeling_own.OwnForCausalLM"
    (own / "config.json").write_text(json.dumps(facts))
    assert not remote_code.is_trusted(own), "the code of another repository"
    del facts["auto_map"]
    (own / "config.json").write_text(json.dumps(facts))
    (own / "more.py").write_text("")
    assert not remote_code.is_trusted(own)
