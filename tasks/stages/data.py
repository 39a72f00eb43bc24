"""The data stages: load and split, judge at the gate, sample pairs where there are none."""

import datetime
import json
import logging
import shutil
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from dpo_core.checked_json import read_checked, write_checked
from dpo_core.data.config import DataConfig
from dpo_core.data.files.read import check_source
from dpo_core.data.load import load
from dpo_core.data.records import to_frame
from dpo_core.data.split import by_source, split_table
from dpo_core.data.tokens.tokenise import TokenConfig
from dpo_core.errors import DataError, GateRefused, ModelError, StageFailed
from dpo_core.methods import estimate
from dpo_core.methods.pair_sampling import PairSamplingConfig, Scored, pair_up
from dpo_core.rewards.functions import reward_identity
from dpo_core.system import digest_file
from expectations.config import GateConfig
from expectations.drift import load_baseline
from tasks.stages.base import Context, Output, Stage, StageResult, Work, run_stage, stage_task
from tasks.stages.workload import Workload
from tasks.store.facts import GateFacts, LoadFacts, SamplingFacts
from tasks.store.manifest import Manifest

log = logging.getLogger("dpo")

LOAD = Stage("load-data", 4, "dataset", LoadFacts)
GATES = {
    kind: Stage(f"validate-{kind}", 2, "dataset", GateFacts, overhead=5.0, subject=kind)
    for kind in ("prompts", "pairs", "unpaired")
}


def kind_of(rows: Manifest) -> Literal["pairs", "unpaired"]:
    """What the rows that a policy is trained on are, and how the stages that read them name this input."""
    return "unpaired" if rows.stage == GATES["unpaired"].name else "pairs"


def _sampling(workload: Workload, label: str) -> estimate.Work:
    config = workload.recipe.pairs
    return workload.drawn(None, config.sampling.max_new_tokens, config.samples_per_prompt)


SAMPLE = Stage("sample-pairs", 3, "dataset", SamplingFacts, _sampling, overhead=4.0)


def source_digests(config: DataConfig) -> dict[str, str]:
    """Digests of the local files that the data comes from: a changed file is other data."""
    digests: dict[str, str] = {}
    for path in config.paths:
        try:
            place = Path(path).expanduser()
            files = sorted(_visible(place)) if place.is_dir() else [place]
            digests |= {str(file): digest_file(file) for file in files if file.is_file()}
        except (OSError, RuntimeError) as error:
            check_source(path)  # says it better where it can
            raise DataError(f"{path} cannot be read ({error})", "Check its permissions") from error
    return digests


def _visible(folder: Path) -> list[Path]:
    """The files of a folder, without those that the reader never opens: a clone's .git, caches."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return [f for f in files if not any(part.startswith(".") for part in f.relative_to(folder).parts)]


@stage_task(LOAD.name)
def load_data(context: Context, config: DataConfig) -> StageResult:
    """Read pairs, unpaired rows or prompts into the canonical table, split by prompt."""

    def work(given: Work) -> Output:
        loaded = load(config)
        frame = split_table(loaded, config)
        for said in loaded.remarks:
            log.info("%s: %s", given.name, said)
        given.mlflow.tag("dpo.data_format", f"{loaded.format}: {loaded.recognised_by}")
        out = given.fresh("out")
        frame.to_parquet(out / "data.parquet", index=False)
        facts = LoadFacts(
            kind=loaded.kind,
            format=loaded.format,
            recognised_by=loaded.recognised_by,
            read_on=datetime.date.today().isoformat(),
            eval_rows=int((frame["split"] == "eval").sum()),
            remarks=list(loaded.remarks),
            sources=by_source(frame),
            **loaded.notes,
        )
        return Output(out, rows=len(frame), facts=facts)

    # The digests stand in the config, so that an edited file misses the cache under the same name.
    slice_ = {"data": config.model_dump(mode="json"), "files": source_digests(config)}
    return run_stage(context, LOAD, {}, slice_, work, ahead=lambda: LoadFacts(kind=load(config).kind))


@stage_task("validate", "validate-{subject}")
def validate(
    context: Context,
    subject: str,
    data: Manifest,
    model: Manifest,
    gate: GateConfig,
    tokens: TokenConfig,
) -> StageResult:
    """Great Expectations on prompts, pairs or unpaired rows; the rows that may go on, report and Data Docs.

    Raises:
        GateRefused: a critical rule failed. Nothing is committed, so nothing downstream can run.
    """
    baseline = load_baseline(gate.baseline) if gate.baseline else None

    def work(given: Work) -> Output:
        from dpo_core.data.tokens.tokenise import Tokenise
        from dpo_core.models.load import load_tokenizer
        from expectations.gate import judge
        from expectations.token_rules import Tokenisation

        frame = pd.read_parquet(data.path / "data.parquet")
        tokenise = Tokenise(load_tokenizer(model.path), tokens)
        if gate.quarantine == "refuse":
            _check_template(frame, tokenise)
        bar = given.progress(len(frame))
        # Beside the store and not in it: pages with times and random names would give every run of the same
        # data another digest.
        docs = context.workspace / "data_docs" / f"{subject}-{given.scratch.name}"
        shutil.rmtree(docs, ignore_errors=True)
        report, kept = judge(
            frame,
            subject=subject,  # type: ignore[arg-type]
            config=gate,
            docs_dir=docs,
            tokenisation=Tokenisation(**tokenise.gate_settings()),
            baseline=baseline,
            tick=bar.update,
        )
        out = given.fresh("out")
        index = Path(report.docs_index).relative_to(context.workspace)
        facts = report.model_copy(update={"docs_index": str(index)})
        (out / "gate.json").write_text(facts.model_dump_json(indent=1))
        given.mlflow.artifact(out / "gate.json")
        given.mlflow.artifact(Path(report.docs_index).parent, "data_docs")
        failed = [f for f in report.findings if not f.passed]
        report.raise_if_refused()
        _require_sides(kept, report.dropped, sampled=data.stage == SAMPLE.name)
        kept.to_parquet(out / "data.parquet", index=False)
        held_out = kept[kept["split"] == "eval"].drop_duplicates(["prompt", "chat"])
        stated = GateFacts(
            dropped=report.dropped,
            warnings=[f.rule for f in failed],
            held_out_prompts=len(held_out),
            written_as=tokenise.note_on(kept["chat"].tolist()),
            **_labels(kept, subject),
        )
        metrics = {f"gate/{f.rule}": float(f.rate) for f in report.findings if not f.skipped}
        metrics |= {"data/rows": float(len(kept)), "data/dropped": float(report.dropped)}
        return Output(out, rows=len(kept), facts=stated, metrics=metrics)

    slice_ = {
        "subject": subject,
        # The baseline by what it says, not by its path.
        "gate": gate.model_dump(mode="json", exclude={"baseline"}),
        "baseline": baseline,
        "tokens": tokens.model_dump(mode="json"),
    }
    return run_stage(context, GATES[subject], {"data": data, "tokenizer": model}, slice_, work)


def _labels(kept: pd.DataFrame, subject: str) -> dict[str, int]:
    """How many training rows there are of each label, or how many pairs say how sure theirs is."""
    train = kept[kept["split"] == "train"]
    if subject == "pairs":
        return {"with_agreement": int(train["agreement"].notna().sum())}
    if subject == "prompts":
        return {}
    label = train["label"]
    return {"desirable": int(label.sum()), "undesirable": int((~label).sum())}


def _check_template(frame: pd.DataFrame, tokenise: Any) -> None:
    """Write one conversation of each order of roles, so that no template fails later, in the training."""
    seen: set[Any] = set()
    sound = frame[frame["chat"] & (frame["fault"] == "")]
    for row in sound.to_dict("records"):
        number, prompt, tools = row["row"], row["prompt"], row.get("tools") or ""
        roles = (bool(tools), *((turn["role"], *sorted(turn)) for turn in json.loads(prompt)))
        if roles in seen:
            continue
        seen.add(roles)
        try:
            tokenise.prompt(prompt, True, tools=tools)
        except ModelError as error:
            raise ModelError(f"row {number} of the data: {error.problem}", error.remedy) from error


def _require_sides(kept: pd.DataFrame, dropped: int, *, sampled: bool) -> None:
    """Both sides of the split must hold something; sampled pairs may lack held-out ones."""
    for side, use in {"train": "training", "eval": "evaluation"}.items():
        if not (kept["split"] == side).any() and not (sampled and side == "eval"):
            raise GateRefused(
                f"no row is left for {use}: the gate dropped {dropped} rows and kept {len(kept)} others",
                "Mend the rows that it names, or add data",
            )


@stage_task(SAMPLE.name)
def sample_pairs(
    context: Context,
    prompts: Manifest,
    reference: Manifest,
    config: PairSamplingConfig,
    tokens: TokenConfig,
    reward: str,
    seed: int,
) -> StageResult:
    """Completions of training and held-out prompts from the reference, labelled by a known reward."""

    def work(given: Work) -> Output:
        from dpo_core.data.files.parquet import read_rows
        from dpo_core.data.tokens.tokenise import Tokenise
        from dpo_core.models.load import load_model, load_tokenizer
        from dpo_core.rewards.model import scorer
        from dpo_core.scoring import flops as cost
        from dpo_core.scoring.model_shape import shape_of

        rows = read_rows(prompts.path / "data.parquet")
        tokenise = Tokenise(load_tokenizer(reference.path), tokens)
        room = config.sampling.max_new_tokens
        asked = [(row, tokenise.prompt_of(row, room)) for row in rows]
        rows = [row for row, ids in asked if ids]
        wanted = [one for one in asked if one[1] for _ in range(config.samples_per_prompt)]
        model = load_model(reference.path)
        drawn = _sample(given, model, wanted, config, tokenise.stop_ids, seed)
        from dpo_core.data.tokens.tokenise import Sequence

        texts = [tokenise.text(c.ids, ids) for (_, ids), c in zip(wanted, drawn, strict=True)]
        rewards = scorer(reward, tokenise, "fp32")(
            [Sequence(ids, c.ids) for (_, ids), c in zip(wanted, drawn, strict=True)],
            [row["prompt"] for row, _ in wanted],
        )
        frame, counts = _label(rows, texts, [c.ended for c in drawn], rewards, config)
        if frame.empty:
            raise StageFailed(
                f"no pair could be made of {counts['samples']} samples: {counts['ties']} candidate pairs are "
                f"ties under the reward {reward}, the other samples are empty or no valid text",
                "Draw more or longer samples (pairs.*), or choose a reward that tells them apart",
            )
        out = given.fresh("out")
        frame.to_parquet(out / "data.parquet", index=False)
        metrics = {f"data/{k}": float(v) for k, v in counts.items()}
        lengths = [(len(ids), len(c.ids)) for (_, ids), c in zip(wanted, drawn, strict=True)]
        flops = cost.sampling(shape_of(model), lengths)
        facts = SamplingFacts(**counts, flops=flops)
        return Output(out, rows=len(frame), facts=facts, metrics=metrics | {"cost/flops": flops})

    slice_ = {
        "pairs": config.model_dump(mode="json"),
        "tokens": tokens.model_dump(mode="json"),
        "reward": reward_identity(reward),
        "seed": seed,
    }
    return run_stage(context, SAMPLE, {"prompts": prompts, "reference": reference}, slice_, work)


# Prompts sampled between two saves: what a kill may cost.
_SAVE_EVERY = 8


def _sample(
    given: Work,
    model: Any,
    wanted: list[Any],
    config: PairSamplingConfig,
    stop_ids: frozenset[int],
    seed: int,
) -> list[Any]:
    """Completions in portions, each saved when it is done, so that a killed stage goes on where it was."""
    from dpo_core.generation.config import seed_for
    from dpo_core.generation.generate import Completion, sample

    bar = given.progress(len(wanted))
    portion = config.sampling.batch_size * _SAVE_EVERY
    drawn: list[Completion] = []
    for start in range(0, len(wanted), portion):
        path = given.scratch / f"samples-{start:08d}.json"
        known = read_checked(path, "its samples are drawn again")
        if known is None:
            prompts = [ids for _, ids in wanted[start : start + portion]]
            done = len(drawn)
            new = sample(
                model,
                prompts,
                config.sampling,
                eos_id=stop_ids,
                seed=seed_for(seed, "pairs", start),
                progress=lambda n, done=done: bar.update(done + n),  # type: ignore[misc]
            )
            known = [[list(c.ids), c.ended] for c in new]
            write_checked(path, known)
        drawn += [Completion(tuple(ids), ended) for ids, ended in known]
    return drawn


def _label(
    rows: list[dict[str, Any]],
    texts: list[str],
    ended: list[bool],
    rewards: list[float],
    config: PairSamplingConfig,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Pairs of every prompt as a canonical table that keeps each prompt's split, and the counts."""
    from dpo_core.data.layouts.fields import Pair

    records: list[Pair] = []
    numbers: list[int] = []
    splits: list[str] = []
    ties = 0
    size = config.samples_per_prompt
    for index, row in enumerate(rows):
        scored = [
            Scored(text, end, value)
            for text, end, value in zip(
                texts[index * size : (index + 1) * size],
                ended[index * size : (index + 1) * size],
                rewards[index * size : (index + 1) * size],
                strict=True,
            )
            # A completion cut inside a character cannot be written as text, an empty one teaches nothing.
            if text.strip() and "�" not in text
        ]
        pairs, tied = pair_up(scored, config) if len(scored) > 1 else ([], 0)
        ties += tied
        for better, worse in pairs:
            records.append(
                Pair(
                    row["prompt"],
                    bool(row["chat"]),
                    better.text,
                    worse.text,
                    chosen_ended=better.ended,
                    rejected_ended=worse.ended,
                    tools=row.get("tools", ""),
                    source=row.get("source", ""),
                )
            )
            numbers.append(int(row["row"]))
            splits.append(row["split"])
    frame = to_frame(records, "pairs", numbers).assign(split=pd.array(splits, dtype="string[pyarrow]"))
    mean = sum(rewards) / len(rewards)
    return frame, {"samples": len(texts), "pairs": len(frame), "ties": ties, "mean_reward": mean}
