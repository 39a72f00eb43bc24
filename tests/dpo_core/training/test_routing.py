"""The router's auxiliary loss: transformers' own value, if the checkpoint's config sets it."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from dpo_core import job as train
from dpo_core.models.load import load_model
from dpo_core.models.reward_model import RewardModel
from dpo_core.scoring.attention import padded_hidden, trunk_of
from dpo_core.scoring.layout import right_padded
from dpo_core.training.routing import router_balance
from tests.support.models.families import make_family
from tests.support.runs.training_jobs import curve, pair_rows, sft_job, write_job

ASKED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
ROWS = [(5, 6, 7, 8, 9, 10), (11, 12, 13), (14, 15, 16, 17)]
FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "jamba", "phimoe", "granitemoe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_transformers_computes(family: str, tmp_path: Path) -> None:
    model = load_model(make_family(tmp_path, family, **ASKED))
    balance = router_balance(model)
    assert balance is not None
    assert balance.coefficient == 0.5
    ids_BT, attention_BT = right_padded(ROWS)
    with balance.recording():
        padded_hidden(model, ids_BT, attention_BT)
        ours, used = balance.loss()
    theirs = model(input_ids=ids_BT, attention_mask=attention_BT, output_router_logits=True).aux_loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert 1 <= float(used["router/most_used"]) <= 2, "2 of 4 experts a token"
    assert 0 <= float(used["router/least_used"]) <= 1
    ours.backward()
    assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in model.parameters())


def test_it_is_left_out_unless_the_config_sets_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, settings in enumerate(({"output_router_logits": True, "router_aux_loss_coef": 0.0}, {})):
        assert router_balance(load_model(make_family(tmp_path / str(number), "mixtral", **settings))) is None
    assert router_balance(load_model(make_family(tmp_path / "dense", "llama"))) is None
    assert not caplog.records
    model = load_model(make_family(tmp_path / "deepseek", "deepseek_v3"))
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.1
    with caplog.at_level(logging.WARNING):
        assert router_balance(model) is None
    assert "transformers has no auxiliary loss for this architecture" in caplog.text


def trained(folder: Path, source: Path, pack_tokens: int | None, **settings: Any) -> list[dict[str, float]]:
    """The curve of one step, with all examples in one pass, from the checkpoint with its config changed."""
    config = source / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    path = sft_job(folder, source)
    job = json.loads(path.read_text())
    job["settings"] |= {"pack_tokens": pack_tokens, "batch_size": 16, "micro_batch_size": 16}
    path.write_text(json.dumps(job))
    assert train.main(["--config", str(path)]) == 0
    return curve(folder)


def test_a_fine_tuning_adds_it_in_packs_as_in_rows(alone: None, tmp_path: Path) -> None:
    source = make_family(tmp_path / "source", "qwen3_moe")
    plain = trained(tmp_path / "plain", source, 1024, output_router_logits=False, router_aux_loss_coef=50.0)
    packs = trained(tmp_path / "packs", source, 1024, output_router_logits=True)
    assert not any(name.startswith("router/") for name in plain[0])
    auxiliary = packs[0]["router/aux_loss"]
    assert auxiliary > 1.9, "top_k where the experts are used alike"
    assert packs[0]["loss"] == pytest.approx(plain[0]["loss"] + 50 * auxiliary, rel=1e-5)
    assert packs[0]["grad_norm"] > 1.01 * plain[0]["grad_norm"]
    rows = trained(tmp_path / "rows", source, None)
    for row, pack in zip(rows, packs, strict=True):
        for name in ("router/aux_loss", "router/most_used", "router/least_used", "loss", "grad_norm"):
            assert row[name] == pytest.approx(pack[name], rel=1e-3), name


def test_pairs_and_reward_models_add_it_too(alone: None, tmp_path: Path) -> None:
    source = make_family(tmp_path / "source", "mixtral", **ASKED)
    settings = {"batch_size": 8, "max_steps": 1, "engine": {"precision": "fp32", "threads": 1}}
    rows = pair_rows(8)
    for kind in ("dpo", "reward"):
        more = {"objective": "simpo"} if kind == "dpo" else {}
        job = write_job(tmp_path / kind, kind, source, rows, settings=settings | more)
        assert train.main(["--config", str(job)]) == 0
        assert curve(tmp_path / kind)[0]["router/aux_loss"] > 1.9
    assert router_balance(RewardModel(trunk_of(load_model(source)))) is not None
