"""Diffusion models in the real trainer: closed-form losses, cached errors, resume, ZeRO, LoRA, export."""

import copy
import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from dpo_core.errors import ModelError, RecipeError, StageFailed
from dpo_core.estimates.by_method import estimate_training
from dpo_core.estimates.estimate import Examples, Inputs
from dpo_core.methods.diffusion import DiffusionConfig
from dpo_core.methods.job import Job
from dpo_core.models.denoiser import load_denoiser, predict
from dpo_core.models.denoiser_flops import image_flops
from dpo_core.objectives import get, names
from dpo_core.reference import LogpShard
from dpo_core.trainers.denoising_errors import Draws, reference_errors
from dpo_core.trainers.diffusion import DiffusionTrainer, build, encode
from dpo_core.training.distributed import start_distributed
from tests.support.models.tiny_diffusion import image_rows, make_tiny_diffusion
from tests.support.runs.training_jobs import curve, launch, write_job

ROWS = image_rows(6)
USABLE = [name for name in names() if not get(name).extras]


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_diffusion(tmp_path_factory.mktemp("pixels"), "pixels")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Stable Diffusion for noise and for v, and a transformer of a flow."""
    kinds = ("epsilon", "v_prediction", "flow")
    return {kind: make_tiny_diffusion(tmp_path_factory.mktemp(kind), kind) for kind in kinds}  # type: ignore[arg-type]


def settings(**changes: Any) -> dict[str, Any]:
    base = {
        "batch_size": 6,
        "micro_batch_size": 6,
        "epochs": 100.0,
        "max_steps": 1,
        "kappa": 0.05,
        "draws": 3,
        "optim": {"learning_rate": 1e-3, "epsilon": 1e-6, "schedule": "constant", "warmup_fraction": 0.0},
        "engine": {"precision": "fp32", "threads": 1, "save_every": 100},
    }
    return base | changes


def job_trainer(folder: Path, model: Path, rows: Sequence[dict[str, Any]] = ROWS, **changes: Any) -> Any:
    """The trainer of a job in this process, and what writes its result."""
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(folder / "rows.parquet", index=False)
    job = Job.model_validate(
        {
            "method": "diffusion", "settings": {}, "model": str(model), "data": str(folder / "rows.parquet"),
            "out": str(folder / "out"), "work": str(folder), "tokens": {}, "seed": 3,
        }
    )  # fmt: skip
    config = DiffusionConfig.model_validate(settings(**changes))
    start_distributed(config.engine)
    return build(job, config)


def gradients(trainer: DiffusionTrainer, split: list[list[int]]) -> tuple[float, list[Tensor]]:
    """Loss and gradient of all examples as one global batch, forwarded in the given parts."""
    trainer.module.zero_grad()
    trainer.begin_step(trainer.examples)
    total = 0.0
    for part in split:
        loss, _ = trainer.losses([trainer.examples[i] for i in part])
        (loss / len(trainer.examples)).backward()
        total += float(loss.detach()) / len(trainer.examples)
    return total, [p.grad.clone() for p in trainer.module.parameters() if p.grad is not None]


# The loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_diffusion_dpo_written_out(kind, alone, folders, tmp_path):
    """By diffusers' own noising and velocity, on means with its constant, against a policy that has moved.

    With another noise for the rejected image the number is another one.
    """
    import diffusers

    trainer, _ = job_trainer(tmp_path, folders[kind])
    with torch.no_grad():
        for parameter in trainer.module.parameters():
            parameter.mul_(1.05)
    loss = float(trainer.losses(trainer.examples)[0].detach())
    scheduler = diffusers.DDIMScheduler.from_pretrained(folders[kind] / "scheduler")
    reference = load_denoiser(folders[kind]).network

    def written_out(other_noise: bool) -> float:
        inside = []
        for example in trainer.examples:
            level, noise = trainer.draws.of(example, 0)
            signs = []
            for side, latents in enumerate(example.latents_S):
                own = torch.randn_like(noise) if other_noise and side else noise
                t = torch.tensor([level])
                noised = scheduler.add_noise(latents[None], own[None], t)
                target = own[None]
                if kind == "v_prediction":
                    target = scheduler.get_velocity(latents[None], own[None], t)
                errors = [
                    float((predict(n, noised, t, example.text[None]) - target).double().square().mean())
                    for n in (trainer.module, reference)
                ]
                weight = float(scheduler.alphas_cumprod[level]) if kind == "v_prediction" else 1.0
                signs.append(weight * (errors[0] - errors[1]))
            beta = trainer.dpo.kappa * example.latents_S[0].numel()
            inside.append(-0.5 * beta * (signs[0] - signs[1]))
        return sum(math.log1p(math.exp(-x)) for x in inside)

    with torch.no_grad():
        assert loss == pytest.approx(written_out(False), abs=1e-5)
        assert loss != pytest.approx(written_out(True), abs=1e-3)
    assert abs(loss / len(ROWS) - math.log(2)) > 1e-4


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_the_first_loss_is_ln_2_and_the_second_is_not(kind, alone, folders, tmp_path):
    trainer, _ = job_trainer(tmp_path, folders[kind], max_steps=2)
    trainer.train()
    first, second = curve(tmp_path)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["error/chosen"] == pytest.approx(1, abs=1e-5)
    assert first["grad_norm"] > 0
    assert second["loss"] != pytest.approx(math.log(2), abs=1e-6)
    assert first["flops"] > 0


@pytest.fixture(scope="module")
def prepared(pixels: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Examples for pairs and for single images, the reference's errors, and a network that has moved."""
    start_distributed(DiffusionConfig(engine={"threads": 1}).engine)
    denoiser = load_denoiser(pixels)
    draws = Draws(denoiser.noise, 2, seed=3)
    examples, errors = {}, {}
    for name in ("dpo", "kto"):
        config = DiffusionConfig.model_validate(settings(objective=name))
        examples[name] = encode(denoiser, ROWS, config)
        errors[name] = reference_errors(denoiser.network, examples[name], draws, config)
    moved = copy.deepcopy(denoiser.network)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(1.02)
    return denoiser.network, moved, draws, examples, errors


@pytest.mark.parametrize("name", USABLE)
def test_every_objective_on_sums_trains_without_a_line_of_its_own(name, alone, prepared, tmp_path):
    """The known value at the reference, and a gradient away from it."""
    network, moved, draws, examples, errors = prepared
    config = DiffusionConfig.model_validate(settings(objective=name, micro_batch_size=6))
    data = "dpo" if config.on_pairs else "kto"
    parts: dict[str, Any] = {"draws": draws, "reference": errors[data], "policy_is_reference": True}
    trainer = DiffusionTrainer(copy.deepcopy(network), examples[data], config, work=tmp_path, **parts)
    trainer.begin_step(trainer.examples)
    loss, _ = trainer.losses(trainer.examples)
    known = get(name).value_at_reference
    value = known(config.term.parameters) if known else None
    if value is not None:
        assert float(loss.detach()) / len(trainer.examples) == pytest.approx(value, abs=1e-5)
    trainer.check_start()
    trainer.module.load_state_dict(moved.state_dict())
    at_moved, found = gradients(trainer, [list(range(len(trainer.examples)))])
    assert math.isfinite(at_moved)
    assert sum(float(g.square().sum()) for g in found) > 0


def test_diffusion_kto_has_its_published_values():
    """Errors ±1e-3 from the reference's on the right sides, its β of 1000 and z_0 = 0."""
    from dpo_core.objectives import UnpairedLogps

    policy_B, reference_B = torch.tensor([0.009, 0.011]).double(), torch.tensor([0.01, 0.01]).double()
    logps = UnpairedLogps(
        -1000 * policy_B, -1000 * reference_B, torch.ones(2), torch.tensor([True, False]),
        kl=torch.zeros(()).double(),
    )  # fmt: skip
    losses = get("kto").function(logps, **get("kto").resolve({"beta": 1.0}))
    assert losses.tolist() == pytest.approx([0.268941] * 2, abs=1e-6)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_cached_reference_and_any_split_give_the_same_step(objective, alone, pixels, tmp_path):
    cached, _ = job_trainer(tmp_path / "a", pixels, objective=objective)
    live, _ = job_trainer(tmp_path / "b", pixels, objective=objective, reference_errors="live")
    with torch.no_grad():
        for trainer in (cached, live):
            for parameter in trainer.module.parameters():
                parameter.mul_(1.01)
    everyone = list(range(len(cached.examples)))
    wanted, grads = gradients(live, [everyone])
    for split in ([everyone], [everyone[::2], everyone[1::2]], [[i] for i in everyone]):
        loss, found = gradients(cached, split)
        assert loss == pytest.approx(wanted, abs=1e-6)
        for got, expected in zip(found, grads, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_both_images_share_the_noise_and_pairs_do_not(alone, pixels, tmp_path):
    trainer, _ = job_trainer(tmp_path, pixels)
    first, second = trainer.examples[:2]
    same = replace(first, latents_S=(first.latents_S[0], first.latents_S[0]))
    policy_S, _ = trainer.draws.errors(trainer.module, [same], 0).split(1)
    both = trainer.draws.errors(trainer.module, [same], 0)
    assert both[0] == both[1] == policy_S
    levels = [trainer.draws.of(e, number)[0] for e in (first, second) for number in range(3)]
    assert len(set(levels)) > 3
    assert trainer.draws.of(first, 0)[1].equal(trainer.draws.of(first, 0)[1])


def test_each_epoch_has_the_next_draw(alone, pixels, tmp_path):
    trainer, _ = job_trainer(tmp_path, pixels, max_steps=4)
    assert trainer.draws.count == 3
    numbers = []
    for step in range(4):
        trainer.step(step)
        numbers.append(trainer.number)
    assert numbers == [0, 1, 2, 0]


# Alarms and refusals -------------------------------------------------------------------------------------


def test_a_policy_that_loses_the_chosen_images_raises_the_alarm(alone, pixels, tmp_path, caplog):
    hacked = {"kappa": 0.01, "optim": {"learning_rate": 0.05, "warmup_fraction": 0.0}, "max_steps": 6}
    trainer, _ = job_trainer(tmp_path, pixels, **hacked)
    with caplog.at_level(logging.WARNING):
        last = trainer.train()
    assert last["error/chosen"] > 1.2
    assert "likelihood displacement: the error on chosen images ended at" in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": "tdpo2"}, "reads tokens"),
        ({"engine": {"zero_stage": 3}}, "zero_stage 0 to 2"),
        ({"engine": {"compile": True}}, "does not compile"),
        ({"parameters": {"tau": 1.0}}, "does not read the parameter 'tau'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes, words):
    with pytest.raises((ValueError, RecipeError), match=words):
        DiffusionConfig(**changes)


def test_what_does_not_fit_the_data_is_refused(alone, pixels, tmp_path):
    single = [{"id": "a", "prompt": "a ring", "image": ROWS[0]["chosen"], "label": True}]
    with pytest.raises(StageFailed, match="learns from pairs, and the rows are single images"):
        job_trainer(tmp_path / "a", pixels, single)
    with pytest.raises(RecipeError, match="needs a batch in one forward pass"):
        job_trainer(tmp_path / "b", pixels, objective="aot", micro_batch_size=3)
    job_trainer(tmp_path / "c", pixels)
    with pytest.raises(StageFailed, match="12 of 12 images have no error of the reference"):
        job_trainer(tmp_path / "c", pixels, image_rows(6, seed=1))
    shard = LogpShard.open(tmp_path / "c" / "reference-errors")
    wrong = {key.tobytes(): shard.tokens(i) * 1.5 for i, key in enumerate(shard.keys_N2)}
    LogpShard.build(wrong).save(tmp_path / "d" / "reference-errors")
    trainer, _ = job_trainer(tmp_path / "d", pixels)
    with pytest.raises(StageFailed, match="errors of policy and reference differ by"):
        trainer.train()


# Whole jobs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [pytest.param("dpo", marks=pytest.mark.slow), "bco"])
def test_a_stopped_job_continues_bit_for_bit(objective, alone, pixels, tmp_path):
    def run(folder: Path, steps: int) -> tuple[Any, list[float]]:
        trainer, _ = job_trainer(
            folder, pixels, objective=objective, max_steps=4, batch_size=4, micro_batch_size=4
        )
        trainer.total_steps = steps
        trainer.train()
        return trainer, [line["loss"] for line in curve(folder)]

    straight, losses = run(tmp_path / "straight", 4)
    run(tmp_path / "parts", 2)
    resumed, parts = run(tmp_path / "parts", 4)
    assert parts == losses
    for key, value in straight.module.state_dict().items():
        assert value.equal(resumed.module.state_dict()[key]), key


def test_every_zero_stage_takes_the_same_steps(alone, pixels, tmp_path):
    losses = []
    for stage in (0, 1, 2):
        engine = {"precision": "fp32", "threads": 1, "zero_stage": stage}
        job_trainer(tmp_path / str(stage), pixels, max_steps=2, engine=engine)[0].train()
        losses.append([line["loss"] for line in curve(tmp_path / str(stage))])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)
    assert losses[0][1] != pytest.approx(losses[0][0], abs=1e-4)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_the_result_is_a_folder_that_diffusers_loads_and_samples(lora, alone, folders, tmp_path):
    import diffusers

    if lora:
        pytest.importorskip("peft")
    model = folders["v_prediction"]
    trainer, export = job_trainer(tmp_path, model, max_steps=2, lora=lora)
    trained = sum(p.numel() for p in trainer.module.parameters() if p.requires_grad)
    assert (trained < sum(p.numel() for p in trainer.module.parameters()) / 2) == bool(lora)
    trainer.train()
    assert curve(tmp_path)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    export(trainer.engine.full_state())
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a ring", num_inference_steps=2, guidance_scale=2.0, output_type="np").images
    assert image.shape == (1, 16, 16, 3)
    before, after = load_denoiser(model).network.state_dict(), load_denoiser(tmp_path / "out").network
    changed = [key for key, value in after.state_dict().items() if not value.equal(before[key])]
    assert after.state_dict().keys() == before.keys()
    assert changed
    files = [(folder / "unet" / "config.json").read_bytes() for folder in (model, tmp_path / "out")]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_two_ranks_are_one_process(stage, pixels, tmp_path):
    def run(processes: int) -> list[dict[str, float]]:
        engine = {"precision": "fp32", "threads": 1, "processes": processes, "zero_stage": stage}
        job = write_job(
            tmp_path / str(processes), "diffusion", pixels, ROWS,
            settings=settings(max_steps=3, micro_batch_size=3, objective="kto", batch_size=12, engine=engine),
        )  # fmt: skip
        launch(job, processes)
        return curve(job.parent)

    for one, two in zip(run(1), run(2), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["kl"] == pytest.approx(one["kl"], abs=1e-5)


def test_the_libraries_of_images_are_imported_inside_functions():
    """A run on text must not load them."""
    import ast

    root = Path(__file__).resolve().parents[3]
    for path in sorted(root.joinpath("dpo_core").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {m.split(".")[0] for m in modules} & {"diffusers", "PIL"}, path


def test_metrics_are_plain_numbers(alone, pixels, tmp_path):
    job_trainer(tmp_path, pixels, objective="kto")[0].train()
    (line,) = curve(tmp_path)
    assert {"error/chosen", "error/rejected", "rewards/margins", "kl", "loss"} <= line.keys()
    assert json.loads(json.dumps(line)) == line


@pytest.mark.parametrize("changes", [{}, {"objective": "kto"}, {"reference_errors": "live"}])
def test_a_plan_counts_the_operations_that_the_training_counts(alone, pixels, tmp_path, changes):
    trainer, _ = job_trainer(tmp_path, pixels, max_steps=5, **changes)
    inputs = Inputs(
        shape=None, examples=lambda data, limit=None: Examples([], len(ROWS)), packed=False, seed=0,
        new_tokens=0, learned_reward=False, image_flops=image_flops(pixels),
    )  # fmt: skip
    steps = range(trainer.total_steps)
    counted = sum(trainer.flops(trainer.batches.of_step(step)) for step in steps)
    before = 2 * len(ROWS) * trainer.draws.count * trainer.forward_flops if trainer.live is None else 0
    assert estimate_training("diffusion", trainer.config, inputs).flops == counted + before > 0


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_a_network_is_counted_without_its_weights(alone, folders, tmp_path, kind):
    trainer, _ = job_trainer(tmp_path, folders[kind])
    assert image_flops(folders[kind]) == trainer.forward_flops


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_the_policy_s_error_is_a_ratio_of_sums(objective, alone, pixels, tmp_path):
    """An image whose error under the reference is almost 0 does not rule it."""
    trainer, _ = job_trainer(tmp_path, pixels, objective=objective, check_rows=0)
    trainer.begin_step(trainer.examples)
    policy_S, ref_S = trainer.surrogates(trainer.examples)
    ref_S = ref_S.clone()
    ref_S[0] = -1e-6
    trainer.surrogates = lambda batch: (policy_S, ref_S)
    _, numbers = trainer.losses(trainer.examples)
    reduced = trainer._reduce(numbers | {"loss": torch.zeros(())}, len(trainer.examples))
    good = torch.tensor([i % 2 == 0 for i in range(len(ref_S))])
    if objective == "kto":
        good = torch.tensor([e.desirable for e in trainer.examples])
    for side, mask in (("chosen", good), ("rejected", ~good)):
        wanted = float(policy_S.detach()[mask].sum() / ref_S[mask].sum())
        assert reduced[f"error/{side}"] == pytest.approx(wanted, rel=1e-5)
    assert not [name for name in reduced if name.startswith("reference/")]


def test_a_network_with_further_inputs_is_refused_before_it_is_counted(folders, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(folders["epsilon"], model)
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps(config | {"num_class_embeds": 4}))
    with pytest.raises(ModelError, match="reads num_class_embeds"):
        image_flops(model)
    (model / "text_encoder" / "config.json").write_text("{}")
    (model / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot be read"):
        image_flops(model)
