"""The run page as HTML: complete, accessible, self-contained, and safe against what it shows."""

import re
from itertools import pairwise

import pytest

from dpo_core.evaluation.decision import Decision, Reason, refuse_same_weights
from dpo_core.methods.registry import get
from tasks.reports.drawing import COLOURS, svg
from tasks.reports.figures import MAX_POINTS, curve_figures
from tasks.reports.measured import MAX_SAMPLES
from tasks.reports.run_report import RunReport, Sample, Turn
from tests.support.reports.outline import Outline
from tests.support.reports.rendered import note, shown, text
from tests.support.reports.rendered import page as render
from tests.support.reports.run_reports import (
    decided,
    digest,
    example,
    hostile,
    make_curves,
    make_evaluation,
    make_policies,
    make_stages,
)


@pytest.fixture(scope="module")
def page() -> str:
    return render(example())


def test_page_order(page: str) -> None:
    headings = Outline(page).headings
    assert headings[0] == (1, "DPO scores higher than SFT")
    assert [text for level, text in headings if level == 2] == [
        "Samples", "Reward against KL", "Policies", "Win rates", "Tasks", "Comparisons", "Training",
        "Data gate", "Cost", "Lineage", "Reproduce", "Words",
    ]  # fmt: skip
    levels = [level for level, _ in headings]
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_page_is_accessible_in_structure(page: str) -> None:
    outline = Outline(page)
    assert outline.all("html")[0]["lang"] == "en"
    assert any(meta.get("name") == "viewport" for meta in outline.all("meta"))
    assert len(outline.all("table")) == len(outline.all("caption")) == 14
    assert all(cell.get("scope") in ("col", "row") for cell in outline.all("th"))
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    assert len(ids) == len(set(ids))
    named = [a for _, a in outline.tags if "aria-labelledby" in a]
    assert all(part in ids for a in named for part in str(a["aria-labelledby"]).split())
    local = [str(a["href"])[1:] for _, a in outline.tags if str(a.get("href", "")).startswith("#")]
    assert local
    assert set(local) <= set(ids)
    figures = [a for a in outline.all("svg") if a.get("role") == "img"]
    assert len(figures) == 13
    assert all(figure["aria-label"] for figure in figures)
    assert all(a.get("tabindex") == "0" for a in outline.all("div") if a.get("class") == "scroll")


def test_page_fetches_nothing_and_is_small() -> None:
    page = render(example(steps=5000))
    outline = Outline(page)
    assert not outline.all("script")
    assert not [a for _, a in outline.tags if "src" in a]
    assert [a["href"] for a in outline.all("link")] == ["data:,"]
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    assert len(page.encode()) < 500_000


def test_page_says_the_numbers(page: str) -> None:
    for word in (
        "+0.523",
        "+0.465 to +0.581",
        "74.2%",
        "n = 1,024",
        "2.6 PFLOP",
        "22 GiB",
        "−0.210",
        "champion",
        "−0.3 pp",
        "1,531",
    ):
        assert word in page, word
    assert "dpo run imdb_sentiment --set dpo.beta=0.1 --set seed=7" in page
    assert digest("train-dpo DPO") in page  # whole, so that it can be copied
    assert "No alarms." in page
    assert "(empty)" in page


def test_page_is_reproducible(page: str) -> None:
    assert render(example()) == page


def test_page_escapes_everything() -> None:
    page = render(hostile())
    outline = Outline(page)
    assert not outline.all("script")
    assert not outline.all("img")
    assert not [k for _, a in outline.tags for k in a if k.startswith("on")]
    assert not [a for a in outline.all("a") if str(a["href"]).startswith("javascript")]
    assert page.count("&lt;script&gt;") > 30
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    assert len(ids) == len(set(ids))  # two stages share a digest here
    assert "default-src 'none'" in page


def test_page_says_what_is_missing() -> None:
    evaluation = make_evaluation()
    no_ppo = [row for row in evaluation.policies if row.name != "PPO"]
    page = render(
        example(
            steps=2,
            evaluation=evaluation.model_copy(update={"policies": no_ppo, "samples": []}),
            curves={},
            policies={"DPO": make_policies()["DPO"]},
        )
    )
    assert "Policy that learns from its own samples (the recipe has none)" in page
    assert "Training (no training metrics were recorded)" in page
    assert "Samples (no completions were recorded)" in page
    assert 'id="training"' not in page
    assert 'id="samples"' not in page
    assert 'id="frontier"' in page


def test_page_of_a_run_that_only_has_a_name() -> None:
    page = render(RunReport(run=example(steps=2).run, candidate="DPO"))
    assert [text for level, text in Outline(page).headings if level < 3] == [
        "DPO was not evaluated", "Reproduce", "Words",
    ]  # fmt: skip
    assert page.count("the run has no evaluation") == 2
    assert "No alarms" not in page  # nothing was measured that could have raised one


def test_page_cuts_long_texts_and_says_so() -> None:
    sample = Sample(prompt="p" * 5000, completions={"SFT": "x"})
    evaluation = make_evaluation().model_copy(update={"samples": [sample] * 40})
    page = render(example(steps=2, evaluation=evaluation))
    assert "(3,500 more characters)" in page
    assert f"{MAX_SAMPLES} of 40 recorded prompts" in page
    assert len(re.findall('class="sample"', page)) == MAX_SAMPLES


def test_samples_show_the_conversation_and_the_datas_own_answer() -> None:
    turns = [Turn(role="system", content="Be brief."), Turn(role="user", content="Name a prime.")]
    sample = Sample(prompt="system: Be brief.", completions={"SFT": "9"}, turns=turns, chosen="Seven.")
    page = render(example(steps=2, evaluation=make_evaluation().model_copy(update={"samples": [sample]})))
    assert re.findall(r'<span class="hint">(\w+)</span><p class="text" dir="auto">(.*?)</p>', page) == [
        ("system", "Be brief."), ("user", "Name a prime."),
    ]  # fmt: skip
    assert "beside the data's own answer" in page.replace("&#39;", "'")
    assert '<p class="text" dir="auto">Seven.</p>' in page


def test_few_steps_are_told_in_numbers() -> None:
    page = render(example(steps=3))
    part = page[page.index('<section id="training"') : page.index('<section id="gate"')]
    assert "<svg" not in part
    assert part.count("3 optimiser steps, from the first to the last. Loss: ") == 2
    assert "3 rounds, from the first to the last. Score: score: " in part


def test_long_curves_are_averaged_not_cut() -> None:
    rows = [{"step": float(i), "loss": float(i % 2)} for i in range(1000)]
    (figure,) = curve_figures("sft", "SFT", get("sft").curves, rows)
    path = max(re.findall(r'<path d="([^"]+)"', svg(figure)), key=len)
    assert MAX_POINTS / 2 <= len(re.findall("[ML]", path)) <= MAX_POINTS + 1  # matplotlib repeats the last
    assert "between 0.400 and 0.600, steps 2 to 997" in figure.description  # means of five neighbours
    assert figure.note == "0.500 → 0.500"


def test_figures_follow_the_theme(page: str) -> None:
    rows = make_curves(30)["train-dpo DPO"]
    figures = curve_figures("dpo", "train-dpo DPO", get("dpo").curves, rows)
    assert [figure.title for figure in figures] == [
        "Loss", "Implicit rewards", "Reward margin", "Preference accuracy", "Log-probability of chosen",
        "Gradient norm",
    ]  # fmt: skip
    light = {light for light, _ in COLOURS.values()}
    for figure in figures:
        assert set(re.findall(r"#[0-9a-f]{6}\b", svg(figure))) <= light
    for light_colour, dark in COLOURS.values():
        assert f'[style*="stroke: {light_colour}"] {{ stroke: {dark} !important; }}' in page


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_colours_reach_wcag_aa_in_both_themes(page: str) -> None:
    themes = [
        re.sub(r"#(.)(.)(.);", r"#\1\1\2\2\3\3;", css) for css in re.findall(r":root \{(.*?)\}", page, re.S)
    ]
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--(\w+): #([0-9a-f]{6})", theme))
        for ground in ("paper", "raised"):
            for ink in colours.keys() - {"paper", "raised", "rule"}:
                pair = sorted((_luminance(colours[ink]), _luminance(colours[ground])))
                assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, (ink, ground)


def test_a_decision_is_the_headline_and_what_was_measured_stays_below_it() -> None:
    page = render(decided(promote=False, curves={}))
    headings = Outline(page).headings
    assert headings[:2] == [(1, "Do not promote"), (2, "DPO scores higher than SFT")]
    rules = re.findall(r'<span class="mark">(. \w+)</span><span>(.*?) <code class="rule">(\w+)', page)
    assert [(mark, rule) for mark, _, rule in rules] == [
        ("✗ failed", "min_win_rate"), ("✓ passed", "min_gain"), ("✓ passed", "max_kl"),
        ("✓ passed", "no_regression"),
    ]  # fmt: skip
    assert "imdb-dpo version 4 does not replace imdb-dpo version 3" in page
    assert "Decision to promote" not in page
    assert "Decision to promote (the recipe does not request one)" in render(example(curves={}))
    assert Outline(render(decided(promote=True, curves={}))).headings[0] == (1, "Promote")


def test_a_decision_without_rules_is_shown_by_every_renderer() -> None:
    report = decided(promote=False, decision=refuse_same_weights("DPO", "version 3"), curves={})
    for show in (render, text, note, shown):
        assert "Nothing new: these are the champion" in show(report)


def test_no_control_character_reaches_a_terminal() -> None:
    rule = Reason(rule="min_gain", passed=False, text="odd\x1b]0;t\x07 \x9brule")
    decision = Decision(promote=False, candidate="a\x1b[31m", champion="b", reasons=[rule])
    odd = decided(promote=False, decision=decision, curves={})
    for show in (text, note, shown):
        assert "odd]0;t rule" in show(odd).replace("\\", "")
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", show(odd))


def test_a_model_on_another_machine_is_not_loaded_from_here() -> None:
    report = example(curves={})
    assert report.model
    for uri, loads in (("file:///models/a", True), ("file://host/models/a", False)):
        page = render(example(curves={}, model=report.model.model_copy(update={"uri": uri})))
        assert ("AutoModelForCausalLM.from_pretrained" in page) is loads


def test_an_early_decision_stands_alone_where_nothing_was_measured() -> None:
    page = render(decided(promote=False, evaluation=None, gate=[], curves={}))
    assert [text for level, text in Outline(page).headings if level < 3][:2] == [
        "Do not promote", "Win rates",
    ]  # fmt: skip


def test_the_lineage_goes_from_the_data_to_the_model() -> None:
    page = render(example(curves={}))
    chain = page[page.index('<ol class="chain"') : page.index("</ol>", page.index('<ol class="chain"'))]
    names = re.findall(r"<strong>(.*?)</strong>", chain)
    assert names == ["validate-pairs", "prepare-sft", "calm-otter-17", "imdb-dpo version 4"]
    digests = re.findall(r'title="(\w+)"', chain)
    expected = [digest("validate-pairs"), digest("prepare-sft"), digest("run")[:32], digest("train-dpo DPO")]
    assert digests == expected


def test_the_cost_adds_up_what_judges_were_paid() -> None:
    part = render(example(curves={})).split('<section id="cost"')[1].split("</section>")[0]
    for word in ("1 h 16 min", "2.6 PFLOP", "22 GiB", "2.42 M", "0.84", "1,024 requests, 204 cached"):
        assert word in part, word
    assert "Judge" not in render(example(curves={}, win_rates=[])).split('<section id="cost"')[1]


def test_the_page_says_why_it_shows_no_learned_reward() -> None:
    assert "Reward model (the run trained none)" in render(example(steps=2))
    stages = [
        s.model_copy(update={"name": "train-reward", "kind": "reward-model"}) if s.name == "evaluate" else s
        for s in make_stages()
    ]
    page = render(example(steps=2, stages=stages))
    assert "Reward model (no pairs were held out to measure it)" in page


def test_the_known_reward_of_a_learned_one_has_its_own_chart() -> None:
    rows = [{"step": i, "objective/scores": i / 9, "objective/gold_scores": -i / 9} for i in range(1, 20)]
    titles = [figure.title for figure in curve_figures("ppo", "PPO", get("ppo").curves, rows)]
    assert titles == ["Score", "Known reward, not trained on"]
