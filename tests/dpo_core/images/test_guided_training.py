"""GRPO of images whose samples are guided: scored in the guided distribution, or in the policy's own."""

from pathlib import Path

import pytest

from dpo_core import job as train
from dpo_core.images.prompts import records
from tests.support.runs.training_jobs import curve, write_job

REWARD = """
def low_codes(prompts, completions, metadata):
    assert all('"include"' in text for text in metadata)
    return [float(sum(int(code) < 60 for code in image.split())) for image in completions]
"""
SAMPLING = {"max_new_tokens": 64, "precision": "fp32"}


def grpo(work: Path, model: Path, score: str) -> list[dict[str, float]]:
    work.mkdir()
    (work / "reward.py").write_text(REWARD)
    prompts = [{"prompt": r.prompt, "chat": False, "metadata": r.to_json()} for r in records("comp", 1, 0)]
    settings = {"iterations": 1, "episodes": 8, "group_size": 4, "micro_batch_size": 8, "guidance": 3.0}
    job = write_job(
        work,
        "grpo",
        model,
        prompts,
        settings=settings | {"score": score} | {"engine": {"precision": "fp32", "threads": 1}},
        reference=str(model),
        sampling=SAMPLING,
        reward_source=f"{work / 'reward.py'}:low_codes",
        tokens={"max_length": 88, "max_prompt_length": 24},
    )
    assert train.main(["--config", str(job)]) == 0
    return curve(work)


def test_guided_samples_are_scored_as_they_were_drawn_or_off_policy_by_name(
    alone: None, scenes_model: Path, tmp_path: Path
) -> None:
    (guided,) = grpo(tmp_path / "guided", scenes_model, "guided")
    (own,) = grpo(tmp_path / "own", scenes_model, "conditional")
    assert guided["sampling/logp_difference/max"] < 1e-4 < own["sampling/logp_difference/mean"]
    assert guided["val/ratio_first"] == own["val/ratio_first"] == 1.0
    # The same samples: KL(guided‖conditional) is the same whichever of the two is learnt from.
    assert guided["sampling/guided_kl"] == pytest.approx(own["sampling/guided_kl"], abs=1e-5)
    assert guided["sampling/guided_kl"] > 1e-3
    assert guided["grad_norm"] > 0 < own["grad_norm"]
    assert guided["completions/clipped_ratio"] == 0
