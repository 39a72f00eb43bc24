"""The page, figures and tables of a study."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from dpo_core.study import Study, summarise
from tasks.reports.drawing import COLOURS, looks, svg
from tasks.reports.study_figures import figures, write_picture
from tasks.reports.study_report import StudyReport, headline, write_report
from tasks.reports.study_tables import study_tables
from tests.support.reports.outline import Outline
from tests.support.reports.rendered import page as render
from tests.support.reports.rendered import shown
from tests.support.reports.rendered import text as markdown
from tests.support.reports.studies import point
from tests.support.reports.studies_measured import ARMS, RUN, hostile_report, make_report, make_study


@pytest.fixture(scope="module")
def report() -> StudyReport:
    return make_report(make_study())


@pytest.fixture(scope="module")
def page(report: StudyReport) -> str:
    return render(report)


# ---------------------------------------------------------------------------------------------------- page


def test_page_order(page: str) -> None:
    outline = Outline(page)
    assert outline.headings[0] == (1, "DPO's reward-KL frontier dominates PPO's")
    assert [text for level, text in outline.headings if level == 2] == [
        "Reward against KL and compute", "Claims", "Policies", "DPO against the others", "Points",
        "Compute for the same reward",
        "Diversity against DPO", "Best of n", "Stages and cost", "Reproduce", "Words",
    ]  # fmt: skip
    levels = [level for level, _ in outline.headings]
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_page_is_accessible_and_fetches_nothing(page: str) -> None:
    outline = Outline(page)
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    assert len(ids) == len(set(ids))
    named = [a for _, a in outline.tags if "aria-labelledby" in a]
    assert all(part in ids for a in named for part in str(a["aria-labelledby"]).split())
    local = {str(a["href"])[1:] for _, a in outline.tags if str(a.get("href", "")).startswith("#")}
    assert local
    assert local <= set(ids)
    assert len(outline.all("table")) == len(outline.all("caption")) == 8
    assert all(cell.get("scope") in ("col", "row") for cell in outline.all("th"))
    assert not outline.all("script")
    assert not [a for _, a in outline.tags if "src" in a]
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    assert "default-src 'none'" in page
    assert len(page.encode()) < 200_000


def test_page_names_what_the_intervals_rest_on(page: str, report: StudyReport) -> None:
    for word in (
        "48 held-out prompts, 16 samples of each policy for each; 3 seeds (0, 1, 2)",
        "400 resamples of prompts and of the seeds of a point",
        "vader_compound, known; a gain of policies that learned from it may not carry over to other measures",
        RUN.run.hardware,
        "sample_pairs 300 TFLOP",
        "No correction for the number of claims",
        "[−0.0439 to +0.0664]",
    ):
        assert word in page, word
    for row in report.summary.settings:
        assert row.setting in page
    for claim in report.claims:
        assert f'<span class="mark">{claim.verdict}</span>' in page


def test_page_escapes_everything() -> None:
    report = hostile_report()
    outline = Outline(render(report))
    assert not outline.all("script")
    assert not outline.all("img")
    assert not [k for _, a in outline.tags for k in a if k.startswith("on")]
    assert render(report).count("&lt;script&gt;") > 8


def test_pages_of_studies_that_lack_much() -> None:
    nothing = render(make_report(make_study({}, best_of=[])))
    assert "Reward against KL: no policy was measured" in nothing
    assert "Reward against KL and compute (no policy was measured)" in nothing
    assert 'id="policies"' not in nothing
    alone = make_report(make_study({"GRPO": (2.0, 1e15)}, seeds=1))
    assert headline(alone)[0] == "Reward against KL: GRPO"
    assert "1 seed (0)" in render(alone)
    assert 'id="differences"' not in render(alone)
    without_few = make_study({"A": (2.0, 1e15), "B": (2.0, 1e15)})
    points = [p for p in without_few.points if "few" not in p.policy]
    named = make_report(without_few.model_copy(update={"points": points}))
    assert named.claims == [], "the claims speak of other policies"
    assert headline(named)[0] == "Reward against KL: A, B"
    assert "A against the others" in render(named)
    assert 'id="claims"' not in render(named)
    assert "DPO" not in markdown(named.model_copy(update={"stages": []}))


@pytest.mark.parametrize(
    ("ours", "theirs", "seeds", "words", "kind"),
    [
        (1.0, 5.0, 3, "DPO's reward-KL frontier dominates PPO's", "good"),
        (5.0, 1.0, 3, "DPO's reward-KL frontier does not dominate PPO's", "bad"),
        (2.0, 2.0, 3, "Whether DPO's reward-KL frontier dominates PPO's is undecided", "unclear"),
        (1.0, 5.0, 2, "Whether DPO's reward-KL frontier dominates PPO's is undecided", "unclear"),
    ],
)
def test_headline(ours: float, theirs: float, seeds: int, words: str, kind: str) -> None:
    study = make_study({"DPO": (ours, 1e15), "PPO": (theirs, 4e15)}, seeds=seeds)
    assert headline(make_report(study)) == (words, kind)


def test_a_report_survives_json(report: StudyReport) -> None:
    assert StudyReport.model_validate_json(report.model_dump_json()) == report


# ------------------------------------------------------------------------------------------------- figures


def _marks(drawn: str) -> dict[str, int]:
    """Marks by colour, those of the legend and of the curves included."""
    uses = re.findall(r"<use [^>]*style=\"fill: (#\w+)", drawn)
    return {name: uses.count(light) for name, (light, _) in COLOURS.items()}


def test_each_policy_has_its_own_look() -> None:
    names = [*ARMS, *(f"other {i}" for i in range(6))]
    assert len({tuple(look) for look in looks(names).values()}) == len(names)
    assert len({look.colour for look in looks(list(ARMS)).values()}) == 7
    assert len({look.marker for look in looks(list(ARMS)).values()}) == 7
    assert looks(["X", "PPO"])["X"] == looks(["DPO"])["DPO"], "by place, not by name"


def test_figures_have_one_mark_a_setting_and_the_legend(report: StudyReport) -> None:
    kl, flops = figures(report.study, report.summary)
    for figure in (kl, flops):
        drawn = svg(figure)
        marks = _marks(drawn)
        for look in ("blue", "orange", "green", "purple", "pink", "teal", "ink"):
            # Bars have marks of their own for nothing: no caps are drawn.
            assert marks[look] == 4 + 1, (figure.title, look)
        for policy in ARMS:
            assert f">{policy}</text>" in drawn
        assert "few" not in drawn, "policies that serve a claim only stay out"
    assert ">best of 16</text>" in svg(kl)
    assert "stroke-dasharray" in svg(kl)


def test_figures_are_said_in_words(report: StudyReport) -> None:
    kl, flops = figures(report.study, report.summary)
    row = report.summary.policy("PPO")
    assert row
    assert f"PPO, 4 points to KL {row.reach:.2f}: {row.at_kl[0].reward.value:.3f} [" in kl.description
    assert "the best of 16 of SFT has" in kl.description
    assert re.search(r"PPO, 4 points: 0\.\d+ for 8\.57 PFLOP", flops.description)


def test_figures_of_hostile_and_odd_policies() -> None:
    report = hostile_report()
    for figure in figures(report.study, report.summary):
        assert "<script" not in svg(figure)
    odd = [
        point("$x$", "beta=0.1", 0, flops=0.0, kl=-0.5),
        point("_y", "beta=0.1", 0, flops=3e9),
        point("a name that is far too long for a legend", "", 0),
    ]
    study = make_study({}).model_copy(
        update={"points": odd, "drawn": None, "prompts": 40, "reference_rewards_P": [0.0] * 40, "best_of": []}
    )
    study = Study.model_validate(study.model_dump())
    kl, flops = figures(study, summarise(study))
    for figure in (kl, flops):
        for name in ("$x$", "_y", "a name that is …"):
            assert f">{name}</text>" in svg(figure)


@pytest.mark.parametrize("drawn", [None, ["PPO"]])
def test_no_figure_without_policies(drawn: list[str] | None) -> None:
    empty = make_study({}, drawn=None)
    assert figures(empty, summarise(empty)) == []
    study = make_study(drawn=drawn)
    assert len(figures(study, summarise(study))) == 2


@pytest.mark.parametrize(("name", "start"), [("f.png", b"\x89PNG"), ("f.svg", b"<?xml")])
def test_the_picture_for_a_readme(tmp_path: Path, report: StudyReport, name: str, start: bytes) -> None:
    write_picture(report.study, report.summary, tmp_path / name)
    data = (tmp_path / name).read_bytes()
    assert data.startswith(start)
    write_picture(report.study, report.summary, tmp_path / ("again" + name[1:]))
    if name == "f.svg":
        assert b"#0a5cab" in data
        assert b"<text" not in data, "letters are outlines"


def test_the_picture_has_a_light_ground_and_colours(tmp_path: Path, report: StudyReport) -> None:
    from matplotlib.image import imread

    write_picture(report.study, report.summary, tmp_path / "f.png")
    pixels = imread(tmp_path / "f.png")
    height, width = pixels.shape[:2]
    assert width > 1500
    assert width > 2 * height
    assert (pixels[0, :, :3] == 1).all()
    assert (pixels[..., 3] == 1).all() if pixels.shape[2] == 4 else True
    blue = abs(pixels[..., :3] - [0x0A / 255, 0x5C / 255, 0xAB / 255]).max(axis=-1) < 0.01
    assert blue[:, : width // 2].any()
    assert blue[:, width // 2 :].any()


# -------------------------------------------------------------------------------------- Markdown, terminal


def test_markdown_tables_keep_their_columns_and_escape_markup() -> None:
    text = markdown(hostile_report())
    outside = text.split("## Reproduce")[0]
    assert "<script" not in outside.replace("\\<", "")
    tables = re.findall(r"(?:^\|.*\n)+", outside, flags=re.M)
    assert len(tables) >= 6
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_markdown_holds_every_number_of_a_setting(report: StudyReport) -> None:
    text = markdown(report)
    line = next(line for line in text.splitlines() if line.startswith("| PPO | beta=0.05 | 3 | "))
    for word in ("8.57 PFLOP", "14 min 00 s", "6 GiB", "51.5", "0.375"):
        assert word in line
    assert text.startswith("# DPO's reward-KL frontier dominates PPO's\n")
    assert "| 7.00 |" in text


def test_tables_compare_the_drawn_policies_and_mark_what_a_policy_does_not_reach(
    report: StudyReport,
) -> None:
    lines = {s.key: s.blocks[0].lines for s in study_tables(report.study, report.summary)}
    for key in ("differences", "compute-ratio", "diversity"):
        assert lines[key]
        assert "few" not in str(lines[key])
    last = {line.label: line.cells[-1].value for line in lines["policies"]}
    assert last["DPO, few"].endswith("*"), "its KL is below 2"
    assert not last["DPO"].endswith("*")


def test_terminal_fits_80_columns(report: StudyReport) -> None:
    for one in (report, hostile_report(), make_report(make_study({}))):
        assert max(map(len, shown(one).splitlines())) <= 80
    for word in ("supported", "contradicted", "undecided", "2.14 PFLOP", "TDPO2", "beta=0.05"):
        assert word in shown(report)


def test_write_report(tmp_path: Path, report: StudyReport, page: str) -> None:
    assert write_report(report, tmp_path / "study").read_text() == page
    assert {file.name for file in (tmp_path / "study").iterdir()} == {
        "page.html", "summary.md", "report.json", "frontier.png",
    }  # fmt: skip
    write_report(make_report(make_study({})), tmp_path / "empty")
    assert not (tmp_path / "empty" / "frontier.png").exists()
