"""The same batch in TRL's own trainers: losses and gradients agree to 1e-5 wherever TRL has the objective.

Needs the extra `bench` (trl==1.16.0). fp32, a tiny Llama, another model as the reference, unequal lengths.

Not compared, because TRL 1.16 has no trainer of it: cDPO (its `sigmoid` ignores label smoothing), IPO on
sums, chi-PO, DPOP, R-DPO, TDPO, ORPO's NLL over the completion alone, and BCO (the trainer with the running
delta is gone; `bco_pair` is left).
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_core.models.load import load_model
from tests.dpo_core.conftest import _process_group, alone  # noqa: F401  the process group that trainers need
from tests.support.golden_objectives import step_of, trainer_of
from tests.support.models.tiny import make_tiny_model, make_tokenizer
from tests.support.runs.training_jobs import (
    pair_rows,
    token_pairs,
    unpaired_rows,
    write_reference,
    write_unpaired_reference,
)

pytestmark = pytest.mark.bench
trl = pytest.importorskip("trl", reason="the extra `bench` is not installed")

ROWS = pair_rows(8)
BETA = 0.3
PLAIN: dict[str, Any] = {"bf16": False, "gradient_checkpointing": False, "report_to": [], "use_cpu": True}

# Ours -> (our parameters, TRL's settings). Where TRL's definition is another, both sides say so in the name.
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dpo": ({"beta": BETA}, {"loss_type": ["sigmoid"]}),
    "hinge": ({"beta": BETA}, {"loss_type": ["hinge"]}),
    "ipo_mean": ({"tau": BETA}, {"loss_type": ["ipo"]}),
    "dpo_norm": ({"beta": BETA}, {"loss_type": ["sigmoid_norm"]}),
    "robust": ({"beta": BETA, "label_smoothing": 0.1}, {"loss_type": ["robust"], "label_smoothing": 0.1}),
    "exo": ({"beta": BETA, "label_smoothing": 0.01}, {"loss_type": ["exo_pair"], "label_smoothing": 0.01}),
    "nca": ({"beta": BETA}, {"loss_type": ["nca_pair"]}),
    "bco_pair": ({"beta": BETA}, {"loss_type": ["bco_pair"]}),
    "sppo_hard": ({"beta": BETA}, {"loss_type": ["sppo_hard"]}),
    "apo_zero": ({"beta": BETA}, {"loss_type": ["apo_zero"]}),
    "apo_down": ({"beta": BETA}, {"loss_type": ["apo_down"]}),
    "aot": ({"beta": BETA, "label_smoothing": 0.1}, {"loss_type": ["aot"], "label_smoothing": 0.1}),
    "aot_unpaired": ({"beta": BETA}, {"loss_type": ["aot_unpaired"]}),
    "discopop": ({"beta": BETA, "temperature": 0.05}, {"loss_type": ["discopop"], "discopop_tau": 0.05}),
    "sft": ({}, {"loss_type": ["sft"]}),
    "fdpo_forward_kl": ({"beta": BETA}, {"f_divergence_type": "forward_kl"}),
    "fdpo_js": ({"beta": BETA}, {"f_divergence_type": "js_divergence"}),
    "fdpo_alpha": (
        {"beta": BETA, "alpha": 0.5},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    ),
    "ld_dpo": ({"beta": BETA, "alpha": 0.4}, {"ld_alpha": 0.4}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Policy, reference, and the reference's cached log-probs of `ROWS`."""
    folder = tmp_path_factory.mktemp("parity")
    policy, reference = make_tiny_model(folder / "policy"), make_tiny_model(folder / "reference", seed=5)
    return policy, reference, write_reference(reference, ROWS, folder / "shard")


def ours(name: str, models: tuple[Path, Path, Path], work: Path, **settings: Any) -> tuple[float, list]:
    trainer = trainer_of(name, models[0], ROWS, work, shard=models[2], **settings)
    return step_of(trainer, [list(range(len(ROWS)))])


def trl_dpo(models: tuple[Path, Path, Path], work: Path, **settings: Any) -> tuple[float, list]:
    """TRL's DPO trainer on the same ids, with its reference in memory."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=str(work),
        beta=BETA,
        per_device_train_batch_size=len(ROWS),
        max_length=None,
        **PLAIN,
        **settings,
    )
    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = DPOTrainer(
        load_model(models[0]),
        ref_model=load_model(models[1]),
        args=config,
        train_dataset=text,
        processing_class=make_tokenizer(),
    )
    rows = [
        {
            "prompt_ids": list(p.chosen.prompt),
            "chosen_ids": list(p.chosen.completion),
            "rejected_ids": list(p.rejected.completion),
        }
        for p in token_pairs(models[0], ROWS)
    ]
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(rows)))
    loss.backward()
    return loss.item(), [p.grad for p in trainer.model.parameters()]


def assert_same(mine: tuple[float, list], theirs: tuple[float, list]) -> None:
    assert mine[0] == pytest.approx(theirs[0], abs=1e-5, rel=1e-5)
    scale = max(float(g.abs().max()) for g in theirs[1])
    assert scale > 1e-4, "a gradient of zeros would agree with anything"
    for one, other in zip(mine[1], theirs[1], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(scale, 1.0))


@pytest.mark.parametrize("name", SAME)
def test_losses_and_gradients_are_trls(name, alone, models, tmp_path):  # noqa: F811
    parameters, settings = SAME[name]
    mine = ours(name, models, tmp_path / "ours", parameters=parameters)
    assert_same(mine, trl_dpo(models, tmp_path / "trl", **settings))


def test_wpo_weights_are_trls(alone, models, tmp_path):  # noqa: F811
    mine = ours("dpo", models, tmp_path / "ours", parameters={"beta": BETA}, weighting="wpo")
    assert_same(mine, trl_dpo(models, tmp_path / "trl", use_weighting=True))


def test_weighted_sums_are_trls(alone, models, tmp_path):  # noqa: F811
    plus = [
        {"objective": "bco_pair", "weight": 0.2, "parameters": {"beta": BETA}},
        {"objective": "sft", "weight": 1.0},
    ]
    mine = ours("dpo", models, tmp_path / "ours", parameters={"beta": BETA}, weight=0.8, plus=plus)
    settings = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    assert_same(mine, trl_dpo(models, tmp_path / "trl", **settings))


def test_a_moving_reference_is_trls(alone, models, tmp_path):  # noqa: F811
    """TR-DPO: one update of the reference toward the policy, and the loss after it."""
    from trl.trainer.callbacks import SyncRefModelCallback

    sync = {"every": 1, "mix": 0.6}
    trainer = trainer_of(
        "dpo", models[0], ROWS, tmp_path, live=models[1], parameters={"beta": BETA}, reference_sync=sync
    )
    policy, reference = load_model(models[0]), load_model(models[1])
    SyncRefModelCallback._sync_target_model(policy, reference, 0.6)
    trainer.end_step(0)
    for mine, theirs in zip(trainer.live.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    reference.save_pretrained(tmp_path / "moved")
    moved = (models[0], tmp_path / "moved", models[2])
    assert_same(step_of(trainer, [list(range(len(ROWS)))]), trl_dpo(moved, tmp_path / "trl"))


# A case -> our objective and settings, TRL's trainer and its settings.
REFERENCE_FREE: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "cpo": (
        "cpo",
        {"parameters": {"beta": BETA, "nll_weight": 0.7}},
        "cpo",
        {"beta": BETA, "cpo_alpha": 0.7},
    ),
    "smoothed cpo": (
        "cpo",
        {"parameters": {"beta": BETA, "label_smoothing": 0.1}},
        "cpo",
        {"beta": BETA, "label_smoothing": 0.1},
    ),
    "simpo": (
        "simpo",
        {"parameters": {"beta": 2.0, "gamma_beta_ratio": 0.25}},
        "cpo",
        {"beta": 2.0, "loss_type": "simpo", "simpo_gamma": 0.5, "cpo_alpha": 0.0},
    ),
    "simpo + sft": (
        "simpo",
        {
            "parameters": {"beta": 2.0, "gamma_beta_ratio": 0.25},
            "plus": [{"objective": "sft", "weight": 0.3}],
        },
        "cpo",
        {"beta": 2.0, "loss_type": "simpo", "simpo_gamma": 0.5, "cpo_alpha": 0.3},
    ),
    "orpo_full": ("orpo_full", {"parameters": {"odds_weight": 0.2}}, "orpo", {"beta": 0.2}),
}


def trl_reference_free(kind: str, model: Path, work: Path, **settings: Any) -> tuple[float, list]:
    """TRL's CPO or ORPO trainer on the same ids."""
    import importlib

    from datasets import Dataset
    from torch.nn.utils.rnn import pad_sequence

    module = importlib.import_module(f"trl.experimental.{kind}")
    config = getattr(module, f"{kind.upper()}Config")(
        output_dir=str(work),
        max_length=128,
        remove_unused_columns=False,
        **PLAIN,
        **settings,
    )
    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = getattr(module, f"{kind.upper()}Trainer")(
        load_model(model), args=config, train_dataset=text, processing_class=make_tokenizer()
    )
    batch: dict[str, torch.Tensor] = {}
    for side in ("chosen", "rejected"):
        sequences = [getattr(p, side) for p in token_pairs(model, ROWS)]
        ids = [torch.tensor(s.prompt + s.completion) for s in sequences]
        labels = [torch.tensor((-100,) * len(s.prompt) + s.completion) for s in sequences]
        batch[f"{side}_input_ids"] = pad_sequence(ids, batch_first=True)
        batch[f"{side}_attention_mask"] = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
        batch[f"{side}_labels"] = pad_sequence(labels, batch_first=True, padding_value=-100)
    loss, _ = trainer.get_batch_loss_metrics(trainer.model.train(), batch)
    loss.backward()
    return loss.item(), [p.grad for p in trainer.model.parameters()]


@pytest.mark.parametrize("case", REFERENCE_FREE)
def test_objectives_without_a_reference_are_trls(case, alone, models, tmp_path):  # noqa: F811
    name, settings, kind, theirs = REFERENCE_FREE[case]
    mine = ours(name, models, tmp_path / "ours", **settings)
    assert_same(mine, trl_reference_free(kind, models[0], tmp_path / "trl", **theirs))


def trl_kto(trainer: Any, policy: Path, reference: Path, work: Path, **settings: Any) -> tuple[Any, ...]:
    """TRL's KTO trainer on the ids of one of ours, mismatched pairs included: loss, gradients and z_0."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    config = KTOConfig(
        output_dir=str(work), max_length=None, train_sampling_strategy="sequential", **PLAIN, **settings
    )
    text = Dataset.from_list([{"prompt": "a", "completion": "b", "label": i == 0} for i in range(2)])
    theirs = KTOTrainer(
        load_model(policy),
        ref_model=load_model(reference),
        args=config,
        train_dataset=text,
        processing_class=make_tokenizer(),
    )
    rows = [
        {
            "prompt_ids": list(e.sequence.prompt),
            "completion_ids": list(e.sequence.completion),
            "KL_completion_ids": list(trainer.mismatched[e.id].sequence.completion),
            "label": e.desirable,
        }
        for e in trainer.examples
    ]
    theirs.model.train()
    loss = theirs.compute_loss(theirs.model, theirs._prepare_inputs(theirs.data_collator(rows)))
    loss.backward()
    gradients = [p.grad for p in theirs.model.parameters()]
    return loss.item(), gradients, theirs._metrics["train"]["kl"][-1]


@pytest.mark.parametrize("clamped", [False, True])
def test_kto_is_trls(clamped, alone, models, tmp_path):  # noqa: F811
    """On the same mismatched pairs: TRL turns the completions within a batch, ours go over the data set.

    TRL's loss is the mean over a RANK's examples and its z_0 that over all ranks; on one rank they are one.
    """
    rows = unpaired_rows(8)
    policy, reference = models[:2] if clamped else (models[1], models[0])
    shard = write_unpaired_reference(reference, rows, tmp_path / "shard")
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.6}
    parameters = {"beta": BETA, **weights}
    trainer = trainer_of("kto", policy, rows, tmp_path / "ours", shard=shard, parameters=parameters)
    assert {e.desirable for e in trainer.examples} == {True, False}
    mine = step_of(trainer, [list(range(len(rows)))])
    *theirs, kl = trl_kto(trainer, policy, reference, tmp_path / "trl", **parameters)
    assert_same(mine, (theirs[0], theirs[1]))
    assert float(trainer.kl) == pytest.approx(kl, abs=1e-5)
    assert (kl == 0) is clamped, "one of the cases is to show z_0, the other its clamp"
