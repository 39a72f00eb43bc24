"""Reports of diffusion models, which have no KL, no length and no entropy."""

from pathlib import Path

from tasks.reports.alarms import alarms
from tasks.reports.run_document import policy_table
from tasks.reports.run_report import ModelRow, RunReport
from tests.support.reports.rendered import page
from tests.support.reports.run_reports import example, make_evaluation, make_policy


def of_images(folder: Path, errors: list[float]) -> RunReport:
    evaluation = make_evaluation()
    none = dict.fromkeys(
        ("kl", "kl_k3", "length", "ended", "distinct_1", "distinct_2", "self_bleu", "entropy",
         "predictive_entropy", "accuracy")
    )  # fmt: skip
    rows = [row.model_copy(update=none) for row in evaluation.policies]
    about = make_policy("diffusion", "DPO")
    (folder / "model_index.json").write_text("{}")
    falling = [{"logps/chosen": -float(i), "rewards/chosen": -1.0 - i / 9, "loss": 0.7} for i in range(20)]
    curve = [{"step": float(i), "error/chosen": error} | falling[i] for i, error in enumerate(errors)]
    return example(
        evaluation=evaluation.model_copy(update={"policies": rows, "vocabulary": None}),
        policies={"DPO": about},
        candidate="DPO",
        curves={about.stage: curve},
        model=ModelRow(name="m", version="1", uri=folder.as_uri(), sha256="a" * 64),
    )


def test_what_images_have_not_is_left_out(tmp_path: Path) -> None:
    report = of_images(tmp_path, [1.0] * 20)
    assert report.evaluation is not None
    labels = [line.label for line in policy_table(report.evaluation, report).lines]
    assert labels == ["Reward", "Gain over SFT", "Win rate"]
    names = {alarm.name for alarm in alarms(report)}
    assert not names & {"Length drift", "Diversity collapse", "Cut answers", "Noise", "KL run-away"}
    assert "Likelihood displacement" not in names
    shown = page(report)
    assert "load_denoiser" in shown
    assert "AutoModelForCausalLM" not in shown


def test_a_growing_error_on_chosen_images_is_an_alarm(tmp_path: Path) -> None:
    (alarm,) = [a for a in alarms(of_images(tmp_path, [1 + i / 20 for i in range(20)])) if a.policy == "DPO"]
    assert alarm.name == "Likelihood displacement"
    assert "1.92 times the reference's" in alarm.message
