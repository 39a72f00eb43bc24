"""Jobs that train on their own samples, on a reward that a tiny model can learn and that can be held up."""

from pathlib import Path
from typing import Any

from tests.support.runs import forked
from tests.support.runs.training_jobs import build_trainer, text, wait_until, write_job

PROMPTS = [{"prompt": text(i, 3), "chat": False} for i in range(12)]
# Counts two letters; a file beside it makes the reward call of that number wait to be killed.
REWARD = """
import time
from pathlib import Path

HERE = Path(__file__).parent
calls = 0


def count_o(prompts, completions):
    global calls
    calls += 1
    while (HERE / f"wait-{calls}").exists():
        (HERE / "waiting").touch()
        time.sleep(0.01)
    return [float(c.count("o") + c.count("e")) for c in completions]
"""


def online_job(work: Path, tiny: Path, method: str, settings: dict[str, Any], **job: Any) -> Path:
    """A job file of ppo, grpo or online_dpo; `engine` in the settings is laid over fp32 on one thread."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "reward.py").write_text(REWARD)
    engine = {"precision": "fp32", "threads": 1, "save_every": 2} | settings.pop("engine", {})
    optim = {"learning_rate": 1e-2, "schedule": "linear", "warmup_fraction": 0.0, "epsilon": 1e-5}
    given: dict[str, Any] = {
        "reference": str(tiny),
        "reward_source": f"{work / 'reward.py'}:count_o",
        "sampling": {"max_new_tokens": 8, "batch_size": 16, "precision": "fp32"},
        "settings": {"optim": optim} | settings | {"engine": engine},
    }
    return write_job(work, method, tiny, PROMPTS, **(given | job))


def train_in_parts(job: Path, first: int) -> Any:
    """Train the first rounds, then the others as a job does that is started again; returns the trainer."""
    for rounds in (first, None):
        trainer = build_trainer(job)
        trainer.total_steps = rounds or trainer.total_steps
        trainer.train()
    return trainer


def kill_in_round(job: Path, call: int) -> None:
    """Start a job and kill it while it waits for its rewards of that call."""
    hold = job.parent / f"wait-{call}"
    hold.touch()
    [process] = forked.start_ranks(job, 1)
    wait_until((job.parent / "waiting").exists, f"reward call {call}")
    process.kill()
    process.join()
    hold.unlink()
