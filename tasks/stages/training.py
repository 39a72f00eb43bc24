"""The training stages on given data: SFT, DPO and the reward model, each a torchrun job that the launcher
starts. Those that sample their own are in `online`."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import pandas as pd

from deploy.launchers import Launcher, State, chosen
from dpo_core.data.demo.demonstrations import review_demonstrations
from dpo_core.data.files.read import check_source, read_rows
from dpo_core.data.tokens.tokenise import TokenConfig
from dpo_core.errors import DataError, DpoError, StageFailed
from dpo_core.methods.dpo import DpoConfig
from dpo_core.methods.reward import RewardModelConfig
from dpo_core.methods.sft import SftConfig
from dpo_core.models.load import parameter_count
from dpo_core.models.remote_code import trusted
from dpo_core.rewards.quality import RewardQuality, reward_quality
from dpo_core.system import digest_file
from tasks.signals import begin_stop, go_on
from tasks.stages.base import Context, Output, Progress, Stage, StageResult, Work, run_stage, stage_task
from tasks.stages.unpaired import taken_apart
from tasks.store.facts import LogpsFacts, RewardFacts, TrainingFacts, facts_of, weights_sha256
from tasks.store.files import disk_fault
from tasks.store.manifest import Manifest, kind_of

log = logging.getLogger("dpo")

_LESS_MEMORY = (
    "Give it more memory, or lower its micro_batch_size (pack_tokens where it packs) or engine.processes, or "
    "set engine.gradient_checkpointing=true (dpo plan tells what it needs), and start the run again without "
    "--resume: finished stages are not run again"
)

SFT = Stage("prepare-sft", 2, "model", TrainingFacts)
DPO = Stage("train-dpo", 2, "model", TrainingFacts)
GUIDE = Stage("train-guide", 2, "model", TrainingFacts)
REWARD = Stage("train-reward", 2, "reward-model", RewardFacts)


@stage_task("prepare-sft")
def prepare_sft(
    context: Context,
    base: Manifest,
    data: Manifest | None,
    config: SftConfig,
    tokens: TokenConfig,
    seed: int,
) -> StageResult:
    """Fine-tune on demonstrations, or on the chosen or desirable answers; the result is the reference of
    everything after."""
    rows, source = demonstrations(config, data, seed)
    inputs = {"base": base}
    if source == "chosen" and data is not None:
        inputs[kind_of(data)] = data

    def work(given: Work) -> Output:
        examples = given.scratch / "demonstrations.parquet"
        pd.DataFrame(rows()).to_parquet(examples, index=False)
        job = {
            "kind": "sft",
            "model": str(base.path),
            "data": str(examples),
            "sft": config.model_dump(mode="json"),
        }
        total = config.steps(len(pd.read_parquet(examples, columns=["id"])))
        return train(given, job, tokens, seed, config.engine.processes, total)

    slice_ = settings_of(config, tokens, seed) | {"source": source}
    return run_stage(context, SFT, inputs, slice_, work)


def demonstrations(config: SftConfig, data: Manifest | None, seed: int) -> tuple[Any, str]:
    """A function that gives the demonstrations, and what names them in the stage's key."""
    if config.made_demonstrations is not None:
        count = config.made_demonstrations
        made = review_demonstrations(count, seed)
        return lambda: [_demonstration(i, p, c) for i, (p, c) in enumerate(made)], f"made:{count}"
    if config.demonstrations is not None:
        path = config.demonstrations
        place = check_demonstrations(path)
        return lambda: _read_demonstrations(path), f"file:{digest_file(place)}"
    if data is None:
        raise StageFailed("SFT has neither demonstrations nor pairs", "Set sft.demonstrations")

    return lambda: chosen_side(pd.read_parquet(data.path / "data.parquet"), kind_of(data)), "chosen"


def chosen_side(rows: pd.DataFrame, kind: str = "pairs") -> list[dict[str, Any]]:
    """The chosen or desirable answers of the training rows as demonstrations, each once."""
    frame = rows[rows["split"] == "train"]
    if kind == "unpaired":
        frame = frame[frame["label"]]
    frame = frame.rename(columns={"chosen": "completion", "chosen_ended": "ended"})
    frame = frame.drop_duplicates(["prompt", "completion"])
    columns = ["id", "prompt", "chat", "completion", "ended", "tools", "answer_chat"]
    return frame[[name for name in columns if name in frame]].to_dict("records")


def check_demonstrations(path: str) -> Path:
    """The file of demonstrations, which is there and can be read.

    Raises:
        DataError: it is not, or it is not one file.
    """
    check_source(path)
    place = Path(path).expanduser()
    if not place.is_file():
        raise DataError(f"there is no file of demonstrations {path}", "Name one file in sft.demonstrations")
    return place


def _demonstration(index: int, prompt: str, completion: str) -> dict[str, Any]:
    return {"id": f"made-{index}", "prompt": prompt, "chat": False, "completion": completion, "ended": True}


def _read_demonstrations(path: str) -> list[dict[str, Any]]:
    found = []
    for first, rows in read_rows(path):
        for number, row in enumerate(rows, first):
            prompt, completion = row.get("prompt"), row.get("completion")
            if not (isinstance(prompt, str) and isinstance(completion, str) and completion.strip()):
                raise DataError(
                    f"{path}, row {number}: a demonstration needs a prompt and a completion, both text",
                    "Mend or remove the row",
                )
            entry = _demonstration(number, prompt, completion)
            found.append(entry | {"id": f"row-{number}"})
    return found


@stage_task("train-dpo", "{stage.name}{context.label}")
def train_dpo(
    context: Context,
    policy: Manifest,
    reference: Manifest,
    pairs: Manifest,
    logps: Manifest | None,
    config: DpoConfig,
    tokens: TokenConfig,
    seed: int,
    stage: Stage = DPO,
) -> StageResult:
    """Preference optimisation of the policy on the training pairs or unpaired rows.

    Args:
        pairs: pairs, which an objective on unpaired rows takes apart, or unpaired rows.
        reference: what the policy is compared with. `logps` are its log-probs; objectives that need it in
            memory load it, and have no `logps`, as those that read no reference.
        stage: `GUIDE` for the first pass of Pre-DPO.
    """

    def work(given: Work) -> Output:
        rows = given.scratch / "train.parquet"
        count = split_to(pairs, "train", rows, limit=config.limit, seed=seed)
        if config.unpaired and kind_of(pairs) == "pairs":
            log.info("%s: %s", stage.name, taken_apart(config, count))
            count *= 2
        job = {
            "kind": "dpo",
            "model": str(policy.path),
            "data": str(rows),
            "reference": str(logps.path / "shard") if logps else None,
            "live_reference": str(reference.path) if config.needs_live_reference else None,
            "policy_is_reference": weights_sha256(reference) == weights_sha256(policy),
            "dpo": config.model_dump(mode="json"),
        }
        return train(given, job, tokens, seed, config.engine.processes, config.steps(count))

    inputs = {"policy": policy, kind_of(pairs): pairs}
    if logps:
        _require_reference(reference, logps)
        inputs["logps"] = logps
    if config.needs_live_reference:
        inputs["reference"] = reference
    return run_stage(context, stage, inputs, settings_of(config, tokens, seed), work)


def _require_reference(reference: Manifest, logps: Manifest) -> None:
    if logps.planned:
        return
    if facts_of(logps, LogpsFacts).reference_weights != weights_sha256(reference):
        raise StageFailed(
            "the cached log-probs are not those of the reference", "Run the cache stage on this reference"
        )


@stage_task("train-reward", "train-reward{context.label}")
def train_reward(
    context: Context,
    base: Manifest,
    pairs: Manifest,
    config: RewardModelConfig,
    tokens: TokenConfig,
    seed: int,
) -> StageResult:
    """A Bradley-Terry reward model on the training pairs, with its quality on the held-out ones."""

    def work(given: Work) -> Output:
        rows = given.scratch / "train.parquet"
        count = split_to(pairs, "train", rows)
        job = {
            "kind": "reward",
            "model": str(base.path),
            "data": str(rows),
            "reward": config.model_dump(mode="json"),
        }
        output = train(given, job, tokens, seed, config.engine.processes, config.steps(count))
        quality = _reward_quality(given.scratch / "out", pairs, tokens, config.engine.precision, seed)
        output.facts = RewardFacts(**output.facts.model_dump(), quality=quality)
        output.metrics |= _quality_metrics(quality) if quality else {}
        return output

    return run_stage(context, REWARD, {"base": base, "pairs": pairs}, settings_of(config, tokens, seed), work)


def _reward_quality(
    model: Path, pairs: Manifest, tokens: TokenConfig, precision: str, seed: int
) -> RewardQuality | None:
    """What the held-out pairs say about a reward model; None where there are none."""
    from dpo_core.data.tokens.tokenise import Tokenise
    from dpo_core.methods.reward import score
    from dpo_core.models.load import load_tokenizer
    from dpo_core.models.reward_model import RewardModel

    frame = pd.read_parquet(pairs.path / "data.parquet")
    tokenise = Tokenise(load_tokenizer(model), tokens)
    held_out, _ = tokenise.pairs(frame[frame["split"] == "eval"].to_dict("records"))
    if not held_out:
        return None
    reward_model = RewardModel.load(model)
    sequences = [s for p in held_out for s in (p.chosen, p.rejected)]
    rewards = score(reward_model, sequences, precision)
    lengths = [s.targets for s in sequences]
    # The gain made the rewards one standard deviation wide, whatever the loss had taught them.
    scale = float(reward_model.gain)
    return reward_quality(rewards[0::2], rewards[1::2], lengths[0::2], lengths[1::2], scale=scale, seed=seed)


def _quality_metrics(quality: RewardQuality) -> dict[str, float]:
    metrics = {
        "eval_rewards/accuracies": quality.accuracy.value,
        "eval_calibration/ece": quality.ece,
        "eval_calibration/brier": quality.brier,
        "eval_calibration/nll": quality.nll,
        "eval_calibration/temperature": quality.temperature,
        "eval_length/spearman": quality.length_spearman,
        "eval_length/gap_spearman": quality.gap_spearman,
    }
    return {name: value for name, value in metrics.items() if value is not None}


def settings_of(config: Any, tokens: TokenConfig, seed: int) -> dict[str, Any]:
    return {"config": config.model_dump(mode="json"), "tokens": tokens.model_dump(mode="json"), "seed": seed}


def split_to(
    data: Manifest,
    split: str,
    path: Path,
    *,
    distinct: list[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> int:
    """Write one side of a split for the job, or a seeded choice of its rows; returns how many."""
    frame = pd.read_parquet(data.path / "data.parquet")
    frame = frame[frame["split"] == split]
    if distinct:
        frame = frame.drop_duplicates(distinct)[distinct]
    if limit is not None and len(frame) > limit:
        frame = frame.sample(limit, random_state=seed)
    frame.to_parquet(path, index=False)
    return len(frame)


def train(
    given: Work, job: dict[str, Any], tokens: TokenConfig, seed: int, processes: int, total_steps: int
) -> Output:
    """Run one training job to its end, streaming its metrics, and describe what it wrote."""
    from dpo_core.models.load import weights_digest

    out = given.scratch / "out"
    shared = {
        "tokens": tokens.model_dump(mode="json"),
        "seed": seed,
        "out": str(out),
        "work": str(given.scratch),
        "trusted_code": trusted(),
    }
    path = given.scratch / "job.json"
    path.write_text(json.dumps(job | shared, indent=1))
    # The folder is the training's own: its stage, settings and data.
    launcher = chosen(f"{given.name} {given.scratch}")
    given.mlflow.tag("dpo.command", launcher.render(path, processes))
    _watch(given, launcher, path, processes, given.progress(total_steps))
    result = json.loads((given.scratch / "result.json").read_text())
    lines = (given.scratch / "metrics.jsonl").read_text().splitlines()
    curve = [json.loads(line) for line in lines]
    (out / "metrics.jsonl").write_text("".join(json.dumps(_timeless(row)) + "\n" for row in curve))
    facts = TrainingFacts(
        steps=len(curve),
        tokens_trained=sum(row.get("num_tokens", 0.0) for row in curve),
        weights_sha256=weights_digest(out) if (out / "config.json").exists() else None,
        final={k: v for k, v in result["metrics"].items() if isinstance(v, float)},
        flops=result["flops"],
        peak_memory_bytes=result["peak_memory_bytes"],
        seconds=sum(row.get("seconds_per_step", 0.0) for row in curve),
    )
    costs = {f"cost/{name}": float(result[name]) for name in ("flops", "peak_memory_bytes")}
    return Output(out, parameters=parameter_count(out), facts=facts, metrics=costs)


def _timeless(row: dict[str, float]) -> dict[str, float]:
    """A line of the curve without clock times, so that the same training gives the same artifact."""
    return {k: v for k, v in row.items() if k not in {"time", "seconds_per_step", "tokens_per_second"}}


def _watch(given: Work, launcher: Launcher, path: Path, processes: int, bar: Progress) -> None:
    """Wait for the job; its curves reach MLflow while it runs. Whatever ends the wait ends the job too."""
    curve, offset = given.scratch / "metrics.jsonl", 0
    handle = launcher.submit(path, processes, given.scratch)
    try:
        while True:
            go_on()
            state = launcher.poll(handle)
            offset = given.mlflow.metrics_from_jsonl(curve, offset)
            if curve.exists():
                bar.update(curve.read_bytes().count(b"\n"))
            if state is not State.RUNNING:
                break
            time.sleep(launcher.pause)
        why = launcher.why(handle) if state is State.FAILED else ""
    except BaseException as error:
        begin_stop(error)
        raise
    finally:
        launcher.cancel(handle)
        given.mlflow.artifact(given.scratch / "train.log", "logs")
    if state is not State.DONE:
        raise _error_of(given, launcher.logs(handle), state, why)


def _error_of(given: Work, tail: str, state: State, why: str) -> DpoError:
    """The error that the job left, as the class its exit code stands for."""
    name = given.stage.name
    if state is State.STOPPED:
        return StageFailed(f"{name} was stopped and saved its state", "Resume the run")
    if _short_of_memory(why):  # the other ranks have only missed the one that was killed
        return StageFailed(f"{name} failed: {why}", _LESS_MEMORY)
    try:
        left = json.loads((given.scratch / "error.json").read_text())
    except (OSError, ValueError):
        return _without_word(given, tail, why)
    if fault := disk_fault(left["problem"], given.scratch, f"stage {name}"):
        return fault
    remedy = _LESS_MEMORY if _short_of_memory(left["problem"]) else left["remedy"]
    error = StageFailed(f"{name}: {left['problem']}", remedy)
    error.exit_code = int(left["exit_code"])
    return error


def _without_word(given: Work, tail: str, why: str) -> DpoError:
    """The error of a job that left none."""
    name = given.stage.name
    if fault := disk_fault(tail, given.scratch, f"stage {name}"):
        return fault
    if why:
        return StageFailed(f"{name} failed: {why}", "Mend that, then resume the run")
    log.error("the end of the log of %s:\n%s", name, tail)
    return StageFailed(
        f"{name} died without a word; its log is {given.scratch / 'train.log'}",
        f"If it ran out of memory: {_LESS_MEMORY}",
    )


def _short_of_memory(said: str) -> bool:
    """Whether a platform's word, or a library's (torch on GPU and CPU, Python), means too little memory."""
    said = said.lower()
    return any(words in said for words in ("out of memory", "can't allocate memory", "memoryerror"))
