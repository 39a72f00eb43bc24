"""Claims of the run page: what was trained, how it was measured, and alarms that affect the decision."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dpo_core.data.answers import AnswerStatistics, measure_answers
from dpo_core.data.tokens.config import TokenConfig
from dpo_core.data.tokens.tokenise import Tokenise
from dpo_core.errors import RecipeError
from dpo_core.evaluation.config import PromotionConfig
from dpo_core.evaluation.decision import Evidence, decide, refuse_same_weights
from dpo_core.evaluation.policy_row import PolicyRow
from dpo_core.evaluation.prompt import Prompt
from dpo_core.methods.dpo import DpoConfig
from dpo_core.methods.kto import KtoConfig
from dpo_core.objectives import get
from tasks.promotion.model_source import Champion
from tasks.recipe.read import load_recipe
from tasks.recipe.recipe import Recipe
from tasks.reports.about import objective_words
from tasks.reports.alarms import alarms, promotion_alarms
from tasks.reports.run_report import EvaluationDetails, RunReport, StageRow, TrainingDescription
from tasks.reports.run_warnings import answers_cut, too_few_prompts
from tasks.reports.verdict import decided, measured_with, verdict
from tasks.runs.record import RunRecord, save_run
from tasks.stages.assess import decide_promotion
from tasks.stages.standalone_evaluation import _training as known_texts
from tasks.stages.standalone_evaluation import _warn_of_contamination as warn_of_contamination
from tasks.stages.suite_results import objective_of, trained_rows
from tasks.store.files import run_folder
from tasks.store.manifest import Manifest
from tests.support.models.tiny import make_tokenizer
from tests.support.reports.outline import Outline
from tests.support.reports.rendered import note, page, shown, text
from tests.support.reports.run_reports import (
    estimate,
    example,
    make_evaluation,
    make_policies,
    with_policy,
)


def measured_by(**changes: Any) -> RunReport:
    return example(steps=2, evaluation=make_evaluation().model_copy(update=changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"learned_from": []},
            "Measured with vader_compound, which no policy of this run learned from.",
        ),
        ({"learned_from": None}, "Measured with vader_compound."),
        (
            {"learned_from": ["DPO", "PPO", "GRPO"], "reward_name": "r.py:polite"},
            "Measured with r.py:polite, which DPO, PPO and GRPO also learned from: a gain may not "
            "carry over to other measures.",
        ),
        (
            {"reward_is_true": False, "reward_name": "reward model"},
            "The reward model is a learned proxy: part of a gain may be reward exploitation.",
        ),
    ],
)
def test_a_reward_is_called_what_it_is(changes: dict[str, Any], said: str) -> None:
    report = measured_by(**changes)
    assert measured_with(report) == verdict(report).reasons[-1] == said


def trained_with(objective: str, **parameters: float) -> RunReport:
    config = (KtoConfig if objective == "kto" else DpoConfig)(objective=objective, parameters=parameters)
    about = TrainingDescription(
        base_model="llama, 1,000 parameters", data="support.jsonl; 51 pairs trained on, 17 held out",
        rows_trained=51, reference="the base model", objective=objective_words(config),
        training="4 steps, learning rate 1e-05", reward="my_reward.py:polite",
    )  # fmt: skip
    return example(steps=2, trained=about, policies=make_policies(objective))


def in_words(report: RunReport) -> dict[str, str]:
    return {
        "page": page(report), "markdown": text(report), "description": note(report), "terminal": shown(report)
    }  # fmt: skip


def test_two_objectives_look_different_wherever_a_run_is_described() -> None:
    simpo, kto = in_words(trained_with("simpo", beta=2.5)), in_words(trained_with("kto"))
    for place, words in simpo.items():
        flat = " ".join(words.replace("\\", "").split())
        assert "DPO (simpo) scores higher than SFT" in flat, place
        assert "simpo, beta 2.5, gamma" in flat, place
        for told in ("llama, 1,000 parameters", "51 pairs trained on, 17 held out", "4 steps"):
            assert told in flat, (place, told)
        assert "kto" not in words, place
        assert "DPO (kto) scores higher" in " ".join(kto[place].replace("\\", "").split())
    assert "DPO (simpo) vs SFT" in simpo["page"], "win rates too"
    assert "DPO (" not in in_words(trained_with("dpo"))["page"]


def test_what_was_trained_stands_directly_under_the_verdict() -> None:
    headings = [text for _, text in Outline(page(trained_with("simpo"))).headings]
    assert headings[:2] == ["DPO (simpo) scores higher than SFT", "What was trained"]


def test_objectives_are_told_with_every_parameter() -> None:
    assert objective_words(DpoConfig()) == "dpo, beta 0.1"
    mixed = DpoConfig.model_validate({"plus": [{"objective": "sft", "weight": 0.5}], "weighting": "wpo"})
    assert objective_words(mixed) == "1 × (dpo, beta 0.1) + 0.5 × (sft); weighting wpo"


CUT = {"max_new_tokens": 48, "chosen_tokens": 71.0, "chosen_ended": 1.0, "vocabulary": 49152}


def answering(policy: str = "DPO", about: dict[str, Any] | None = None, **row: Any) -> RunReport:
    report = with_policy(policy, **row)
    assert report.evaluation is not None
    evaluation = report.evaluation.model_copy(update=CUT | (about or {}))
    return report.model_copy(update={"evaluation": evaluation})


def test_answers_that_are_all_cut_raise_an_alarm_with_the_field_to_raise() -> None:
    (alarm,) = alarms(answering(ended=0.0))
    assert alarm.name == "Cut answers"
    assert alarm.message.startswith(
        "DPO: 100.0% of the answers are cut at evaluate.sampling.max_new_tokens 48"
    )
    assert "a median of 71 tokens: raise evaluate.sampling.max_new_tokens" in alarm.message
    assert alarms(answering(ended=0.6)) == []
    assert alarms(answering(ended=0.0, about={"chosen_ended": 0.1})) == [], "the data's are cut by design"
    assert alarms(answering(ended=0.0, about={"chosen_tokens": None, "chosen_ended": None})) == []


def test_noise_raises_an_alarm() -> None:
    (alarm,) = alarms(answering("SFT", predictive_entropy=estimate(10.79, 0.01)))
    assert (alarm.name, alarm.policy) == ("Noise", "SFT")
    assert "its entropy is 10.8 of at most 10.8 nats per token" in alarm.message
    assert alarms(answering("SFT", predictive_entropy=estimate(7.0, 0.1))) == [], "words by their frequency"


def test_alarms_count_in_the_decision() -> None:
    raised = alarms(answering(ended=0.0))
    concern = promotion_alarms(raised, example(steps=2))
    evidence = Evidence(estimate(0.5, 0.1), estimate(3, 0.1), None, True, concern)
    decision = decide(PromotionConfig(), evidence, candidate="m version 2", champion="the reference")
    assert not decision.promote
    (failed,) = (reason for reason in decision.reasons if not reason.passed)
    assert failed.rule == "alarms"
    other = alarms(with_policy("DPO", length=estimate(66, 2)))
    allowed = decision.model_copy(update={"promote": True})
    headline, kind, reasons, _ = decided(allowed, other)
    assert (headline, kind) == ("Promote? Look at an alarm first", "unclear"), "no green above an alarm"
    assert "Alarms: Length drift." in reasons[0]
    assert decided(allowed).headline == "Promote"
    longer = with_policy("PPO", length=estimate(90, 2))
    assert promotion_alarms(alarms(longer), longer) == {}, "of a baseline"


def test_the_champions_own_weights_are_nothing_new() -> None:
    champion = Champion("m version 1", Manifest.model_construct(sha256="a"))
    recipe = Recipe.model_validate({"name": "m", "data": {"path": "pairs.jsonl"}})
    rows = [PolicyRow.model_construct(name=name) for name in ("SFT", "DPO")]
    evaluation = EvaluationDetails.model_construct(policies=rows)
    decision = decide_promotion(recipe, evaluation, [], [], {}, champion, "m version 1")
    assert decision == refuse_same_weights("m version 1", "m version 1")
    headline, kind, reasons, _ = decided(decision)
    assert (headline, kind) == ("Nothing new: these are the champion's weights", "unclear")
    assert reasons == ["m version 1 has the weights of the champion, m version 1."]


def test_parameters_far_from_an_objectives_default_are_pointed_out() -> None:
    assert get("simpo").unusual({"beta": 0.1, "gamma_beta_ratio": 0.5}) == [
        "simpo with beta 0.1 (its default: 2; 0.1 is dpo's)"
    ]
    assert get("simpo").unusual(get("simpo").resolve({})) == []
    assert get("dpo").unusual({"beta": 0.01}) == [], "a usual try"
    assert get("dpo").unusual({"beta": 5}) == ["dpo with beta 5 (its default: 0.1)"]


def test_a_recipe_to_start_from_keeps_no_parameter_that_is_a_default() -> None:
    recipe = Recipe.model_validate(
        {
            "name": "m", "data": {"path": "pairs.jsonl"},
            "policies": {
                "DPO": {
                    "method": "dpo",
                    "parameters": {"beta": 0.1},
                    "plus": [{"objective": "simpo", "parameters": {"beta": 2.0, "gamma_beta_ratio": 0.3}}],
                },
                "Online": {"method": "online_dpo", "parameters": {"beta": 0.1}},
            },
        }
    )  # fmt: skip
    trimmed = recipe.without_default_parameters().policies
    assert trimmed["DPO"].settings.parameters == trimmed["Online"].settings.parameters == {}
    assert trimmed["DPO"].settings.plus[0].parameters == {"gamma_beta_ratio": 0.3}
    assert trimmed["DPO"].settings.terms == recipe.policies["DPO"].settings.terms


def test_what_data_and_recipe_tell_before_the_run() -> None:
    recipe = Recipe.model_validate({"name": "m", "data": {"path": "pairs.jsonl"}})
    assert "16 held-out prompts will be compared, fewer than promotion.min_prompts 30" in too_few_prompts(
        recipe, 16
    )
    assert too_few_prompts(recipe, 30) == ""
    few = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"prompts": 8})})
    assert "raise evaluate.prompts" in too_few_prompts(few, 500)
    limit = recipe.evaluate.sampling.max_new_tokens
    warning = answers_cut(recipe, AnswerStatistics([limit + 1, limit + 5, 3], 1.0))
    assert warning.startswith(
        f"expected: 66.7% of the answers are cut at evaluate.sampling.max_new_tokens {limit}"
    )
    assert warning.endswith("Otherwise the model will not be promoted.")
    assert answers_cut(recipe, AnswerStatistics([limit, limit, 3], 1.0)) == ""
    assert answers_cut(recipe, AnswerStatistics([limit + 1] * 3, 0.0)) == "", "sampled answers, cut by design"
    assert answers_cut(recipe, None) == ""


def test_answers_of_the_data_are_measured_as_they_are_learnt(tmp_path: Path) -> None:
    tokenise = Tokenise(make_tokenizer(), TokenConfig(max_length=64, max_prompt_length=32))
    pairs = pd.DataFrame({"chosen": ["good", "good and warm"], "chosen_ended": [True, False]})
    answers = measure_answers(pairs, tokenise)
    assert answers is not None
    lengths = [len(tokenise.completion("good", True)), len(tokenise.completion("good and warm", False))]
    assert (answers.tokens, answers.complete) == (lengths, 0.5)
    rows = pd.DataFrame({"completion": ["good", "bad"], "ended": [True, True], "label": [True, False]})
    desirable = measure_answers(rows, tokenise)
    assert desirable is not None
    assert desirable.tokens == lengths[:1]
    assert measure_answers(pd.DataFrame({"prompt": ["x"]}), tokenise) is None
    assert json.loads(example(steps=2).model_dump_json())["trained"] is None


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("policies.DPO.optim.lr=1e-5", "learning_rate?"),
        ("learning_rate=1e-5", "did you mean policies.NAME.optim.learning_rate?"),
        ("beta=1", "did you mean policies.NAME.parameters.beta?"),
        ("max_new_tokens=9", "did you mean evaluate.sampling.max_new_tokens?"),
        ("policies.DPO={method: grpo, varient: rloo}", "did you mean policies.DPO.variant?"),
        ("sft={enabled: false, epochs: 3}", "override the whole section: --set 'sft={enabled: false}'"),
    ],
)
def test_a_field_that_is_not_there_is_answered_with_the_one_that_was_meant(override: str, meant: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("hh-harmless", ["data.path=x.jsonl", override])
    assert meant in str(caught.value)


def test_objectives_are_named_in_capitals_or_not() -> None:
    recipe = load_recipe(
        "hh-harmless", ["data.path=x.jsonl", "policies.DPO.objective=SimPO", "policies.DPO.parameters={}"]
    )
    settings = recipe.policies["DPO"].settings
    assert settings.objective == settings.terms[0].name == "simpo"


def test_prompts_that_a_run_was_trained_on_are_pointed_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = tmp_path / "rows"
    table.mkdir()
    rows = {"prompt": ["Is the soup warm?", "And the bread?"], "chat": [False, False]}
    pd.DataFrame(rows | {"chosen": ["Yes.", "No."], "split": ["train", "eval"]}).to_parquet(
        table / "data.parquet"
    )
    stage = StageRow(name="validate-pairs", state="ran", seconds=1, uri=table.as_uri())
    record = RunRecord(run_id="m-1", recipe="m", status="done", started_at=datetime.now(UTC))
    save_run(tmp_path, record)
    report = run_folder(tmp_path, "m-1") / "report.json"
    report.write_text(example(steps=2, stages=[stage]).model_dump_json())
    tables = [trained_rows(spec, tmp_path) for spec in ("m-1", "m-1:ppo", "elsewhere", "/a/folder")]
    assert tables == [table / "data.parquet"] * 2 + [None, None]
    objectives = [objective_of(spec, tmp_path) for spec in ("m-1", "m-1:ppo", "m-1:sft", "/a/folder")]
    assert objectives == ["dpo", "ppo", "", ""]
    training = known_texts(None, tables)
    chat = json.dumps([{"role": "user", "content": "Is the soup warm?"}])
    prompts = [Prompt("is the soup warm", False), Prompt(chat, True), Prompt("And the bread?", False)]
    warn_of_contamination(prompts, training)
    assert "2 of 3 prompts are in the models' training data" in caplog.text
    assert known_texts(None, [None]) is None
