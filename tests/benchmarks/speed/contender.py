"""One side of a comparison, in a process of its own: `python -m tests.benchmarks.speed.contender race.json`.

Both sides train on the same pairs in batches of the same size, each pair once, against the same reference
values, with the same AdamW. Written as JSON: seconds of every step, losses of the first pairs, peak memory,
and the operations that all steps took, those on padding and on repeated prompts included.
"""

import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch

from dpo_core.config import Config
from dpo_core.data.tokens.sequences import TokenPair, TokenSequence
from dpo_core.scoring import flops as cost
from dpo_core.scoring.model_shape import shape_of_config
from dpo_core.training.distributed import peak_bytes

BETA = 0.1
LEARNING_RATE = 1e-6
COMPARED = 8


class Race(Config):
    """What one contender runs."""

    contender: Literal["ours", "trl"]
    """Whose trainer."""
    model: str
    """Checkpoint folder."""
    pairs: str
    """JSON file of the pairs: ids, and the reference's summed log-probs."""
    out: str
    """Where the result goes."""
    precision: Literal["fp32", "bf16"]
    """bf16: autocast over fp32 weights."""
    batch_size: int
    """Pairs in an optimiser step."""
    micro_batch_size: int = 8
    """TRL: pairs in a forward pass."""
    pack_tokens: int = 4096
    """Ours: tokens in a forward pass."""
    threads: int | None = None
    """CPU threads."""
    compile: bool = False
    """Ours: compile the decoder layers."""


def write_pairs(path: Path, pairs: list[TokenPair], reference: list[tuple[float, float]]) -> None:
    """Pairs and their reference values, for both contenders."""
    rows = [
        {
            "id": p.id,
            "prompt_ids": p.chosen.prompt,
            "chosen_ids": p.chosen.completion,
            "rejected_ids": p.rejected.completion,
            "ref_chosen_logps": chosen,
            "ref_rejected_logps": rejected,
        }
        for p, (chosen, rejected) in zip(pairs, reference, strict=True)
    ]
    path.write_text(json.dumps(rows))


def run(race: Race) -> dict[str, Any]:
    """Train on every pair once; see the module."""
    if race.threads:
        torch.set_num_threads(race.threads)
    rows = json.loads(Path(race.pairs).read_text())
    with tempfile.TemporaryDirectory() as work:
        result = {"ours": _ours, "trl": _trl}[race.contender](race, rows, Path(work))
    return result | {"peak_bytes": peak_bytes()}


# Each contender loads its own libraries.


def _ours(race: Race, rows: list[dict[str, Any]], work: Path) -> dict[str, Any]:
    import numpy as np

    from dpo_core.methods.dpo import DpoConfig
    from dpo_core.models.load import load_model
    from dpo_core.reference import LogpShard, sequence_key
    from dpo_core.trainers.dpo import DpoTrainer
    from dpo_core.training.distributed import start_distributed

    pairs = [
        TokenPair(
            row["id"],
            *(
                TokenSequence(tuple(row["prompt_ids"]), tuple(row[f"{s}_ids"]))
                for s in ("chosen", "rejected")
            ),
        )
        for row in rows
    ]
    entries = {}
    for pair, row in zip(pairs, rows, strict=True):
        for side in ("chosen", "rejected"):
            sequence = getattr(pair, side)
            values = np.zeros(len(sequence.completion), np.float32)
            values[0] = row[f"ref_{side}_logps"]  # the objective reads the sum
            entries[sequence_key(sequence)] = values
    config = DpoConfig(
        parameters={"beta": BETA},
        batch_size=race.batch_size,
        pack_tokens=race.pack_tokens,
        optim={"learning_rate": LEARNING_RATE, "schedule": "constant", "warmup_fraction": 0.0},
        engine={"precision": race.precision, "threads": race.threads, "compile": race.compile},
        check_rows=0,
    )
    start_distributed(config.engine)
    module = load_model(Path(race.model))
    module.train()
    trainer = DpoTrainer(
        module,
        pairs,
        config,
        reference=LogpShard.build(entries),
        policy_is_reference=True,
        seed=0,
        work=work,
    )
    with torch.no_grad():
        first = [trainer.losses([pair])[0].item() for pair in pairs[:COMPARED]]
    seconds, flops = [], 0.0
    for step in range(trainer.total_steps):
        start = time.perf_counter()
        flops += trainer._step(step)["flops"]
        _synchronise()
        seconds.append(time.perf_counter() - start)
    return {"first_losses": first, "seconds": seconds, "pairs_per_step": race.batch_size, "flops": flops}


def _trl(race: Race, rows: list[dict[str, Any]], work: Path) -> dict[str, Any]:
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from dpo_core.models.load import load_model

    torch.backends.cuda.enable_cudnn_sdp(False)  # NaN gradients in bf16 with torch 2.13
    config = DPOConfig(
        output_dir=str(work),
        beta=BETA,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        per_device_train_batch_size=race.micro_batch_size,
        gradient_accumulation_steps=race.batch_size // race.micro_batch_size,
        num_train_epochs=1,
        bf16=race.precision == "bf16",
        gradient_checkpointing=False,
        precompute_ref_log_probs=True,
        max_length=None,
        logging_steps=10_000,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
    )
    # The trainer insists on a tokenizer and on text; the ids that are trained on are put in afterwards.
    words = {"[EOS]": 0, "a": 1, "b": 2, "c": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="a")), eos_token="[EOS]", pad_token="[EOS]"
    )
    module = load_model(Path(race.model))
    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = DPOTrainer(module, args=config, train_dataset=text, processing_class=tokenizer)
    trainer.train_dataset = Dataset.from_list([{k: v for k, v in row.items() if k != "id"} for row in rows])
    # Losses of the first pairs one by one, as its own trainer computes them.
    batches = [trainer.data_collator([row]) for row in rows[:COMPARED]]
    with torch.no_grad(), trainer.compute_loss_context_manager():
        first = [
            trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).item() for batch in batches
        ]

    flops, shape, collate = 0.0, shape_of_config(module.config), trainer.data_collator

    def counted(rows: list[dict[str, Any]]) -> dict[str, Any]:
        nonlocal flops
        batch = collate(rows)
        height, width = batch["input_ids"].shape
        # Its head runs at positions of completions alone, as ours does.
        scored = float(batch["completion_mask"][:, 1:].sum())
        flops += cost.training(shape, height * width, height * width**2, scored)
        return batch

    trainer.data_collator = counted
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            _synchronise()
            seconds.append(time.perf_counter() - self.start)

    trainer.add_callback(Clock())
    trainer.train()
    return {"first_losses": first, "seconds": seconds, "pairs_per_step": race.batch_size, "flops": flops}


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(argv: list[str]) -> int:
    logging.disable(logging.WARNING)
    race = Race.model_validate(json.loads(Path(argv[0]).read_text()))
    Path(race.out).write_text(json.dumps(run(race)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
