"""The pages in a real browser: nothing overflows, nothing is invisible, both themes can be read.

The screenshots lie in pytest's temporary folder (`--basetemp` chooses it).
"""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.reports.run_report import RunReport
from tests.support.reports.evaluations import make_evaluation_report
from tests.support.reports.rendered import Report, page
from tests.support.reports.run_reports import (
    alarming,
    coinciding,
    crowded,
    decided,
    example,
    hostile,
    make_quality,
)
from tests.support.reports.studies_measured import hostile_report, make_report, make_study
from tests.support.sites.browser import axe_violations, chromium, requested

pytestmark = pytest.mark.slow

WIDTHS = {"phone": 390, "desktop": 1280}
FIGURES = {
    "usual": 13, "promoted": 13, "alarming": 13, "coinciding": 1, "crowded": 1, "hostile": 9, "bare": 0,
    "evaluation": 0,
    "study": 2, "hostile study": 2, "bare study": 0,
}  # fmt: skip

# Every text node's colour against the nearest painted background, as WCAG contrast; the lowest ones first.
CONTRAST = """
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const ground = node => {
  for (let e = node; e; e = e.parentElement) {
    const colour = rgb(getComputedStyle(e).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour;
  }
  return matchMedia("(prefers-color-scheme: dark)").matches ? [0, 0, 0] : [255, 255, 255];
};
const found = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const element = walk.currentNode.parentElement, text = walk.currentNode.data.trim();
  if (!text || !element.getClientRects().length || element.closest("title, desc")) continue;
  const style = getComputedStyle(element);
  const colour = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
  const [a, b] = [light(rgb(colour)), light(ground(element))];
  found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), text.slice(0, 40)]);
}
return found.sort((x, y) => x[0] - y[0]);
"""

# Drawn text that leaves its own figure by more than two pixels, or lies on other text of the figure.
BAD_LABELS = """
const bad = [];
for (const chart of document.querySelectorAll("svg.chart")) {
  const frame = chart.getBoundingClientRect();
  const boxes = [...chart.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
  boxes.forEach(([text, box], i) => {
    if (box.left < frame.left - 2 || box.right > frame.right + 2 || box.top < frame.top - 2
        || box.bottom > frame.bottom + 2) bad.push("outside: " + text);
    for (const [other, o] of boxes.slice(i + 1))
      if (box.left < o.right - 1 && o.left < box.right - 1
          && box.top < o.bottom - 1 && o.top < box.bottom - 1)
        bad.push(`overlap: ${text} / ${other}`);
  });
}
return bad;
"""


# Figures without a visible drawing, and drawn shapes that leave their own figure by more than two pixels.
BAD_DRAWINGS = """
const bad = [];
for (const chart of document.querySelectorAll("svg.chart")) {
  const frame = chart.getBoundingClientRect();
  const shapes = [...chart.querySelectorAll("path, use")].filter(s => !s.closest("defs, clipPath"));
  const boxes = shapes.map(s => s.getBoundingClientRect()).filter(b => b.width + b.height > 0);
  if (boxes.length < 4) bad.push(`${chart.getAttribute("aria-label").split(":")[0]}: ${boxes.length} shapes`);
  for (const b of boxes)
    if (b.left < frame.left - 2 || b.right > frame.right + 2 || b.top < frame.top - 2
        || b.bottom > frame.bottom + 2)
      bad.push(`${chart.getAttribute("aria-label").split(":")[0]}: leaves its figure`);
}
return bad;
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium(requests=True) as driver:
        yield driver


def _open(driver: Any, file: Path, width: int, theme: str) -> None:
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    driver.get(file.as_uri())


def _screenshot(driver: Any, file: Path) -> None:
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
    file.write_bytes(base64.b64decode(shot["data"]))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("run_page")
    reports: dict[str, Report] = {
        "usual": example(),
        "hostile": hostile(),
        "alarming": alarming(),
        "promoted": decided(promote=True, reward_model=make_quality()),
        "coinciding": coinciding(),
        "crowded": crowded(),
        "bare": RunReport(run=example(steps=2).run, candidate="DPO"),
    }
    reports |= {
        "study": make_report(make_study()),
        "hostile study": hostile_report(),
        "bare study": make_report(make_study({})),
        "evaluation": make_evaluation_report(),
    }
    for name, report in reports.items():
        (folder / f"{name}.html").write_text(page(report), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in reports}


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("name", FIGURES)
def test_page_in_a_browser(browser: Any, pages: dict[str, Path], name: str, size: str, theme: str) -> None:
    _open(browser, pages[name], WIDTHS[size], theme)
    # What is folded is looked at as well.
    browser.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")
    _screenshot(browser, pages[name].with_name(f"{name}-{size}-{theme}.png"))

    assert set(requested(browser)) <= {pages[name].as_uri(), "data:,"}
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "DEBUG"] == []
    assert browser.execute_script("return innerWidth") == WIDTHS[size]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= WIDTHS[size]
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('svg.chart')].map(s => s.getBoundingClientRect())"
        ".map(b => [b.width, b.height])"
    )
    assert len(boxes) == FIGURES[name]
    assert all(width > 250 and height > 80 for width, height in boxes)
    assert browser.execute_script(BAD_DRAWINGS) == []
    assert browser.execute_script(BAD_LABELS) == []
    contrast = browser.execute_script(CONTRAST)
    assert len(contrast) > 10
    assert contrast[0][0] >= 4.5, contrast[:5]
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (theme == "light")
    assert axe_violations(browser, "wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice") == []


def test_axe_and_the_checks_of_figures_see_what_is_wrong(browser: Any, pages: dict[str, Path]) -> None:
    _open(browser, pages["study"], 1280, "light")
    browser.execute_script(
        "document.querySelector('figure').insertAdjacentHTML('afterend', '<img><h6>pale</h6>');"
        "document.querySelector('svg.chart path').setAttribute('transform', 'translate(-99 0)');"
    )
    found = {rule for rule, _, _ in axe_violations(browser, "wcag2a", "best-practice")}
    assert {"image-alt", "heading-order"} <= found
    assert browser.execute_script(BAD_DRAWINGS) == ["Reward against KL to the reference: leaves its figure"]


def test_one_click_selects_a_whole_digest(browser: Any, pages: dict[str, Path]) -> None:
    _open(browser, pages["usual"], 1280, "light")
    code = browser.find_element("css selector", "#lineage table .digest")
    code.click()
    assert browser.execute_script("return getSelection().toString()") == code.get_attribute("title")
    assert len(code.get_attribute("title")) == 64


def test_no_markup_of_a_completion_becomes_an_element(browser: Any, pages: dict[str, Path]) -> None:
    _open(browser, pages["hostile"], 1280, "light")
    assert browser.execute_script("return document.querySelectorAll('script, img, iframe').length") == 0
    assert "<script>alert(1)</script>" in browser.find_element("css selector", ".prompt").text
