"""A real headless Chromium for tests; skips where there is none."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import pytest

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars",
    "--window-size=1600,1300",
)  # fmt: skip


@contextmanager
def chromium(requests: bool = False) -> Iterator[Any]:
    """A selenium driver that keeps the console's messages, and what it requests where that is asked for."""
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not binary or not chromedriver:
        pytest.skip("chromium and chromedriver are not installed (apt-get install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in FLAGS:
        options.add_argument(flag)
    kept = {"browser": "ALL"} | ({"performance": "ALL"} if requests else {})
    options.set_capability("goog:loggingPrefs", kept)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    try:
        yield driver
    finally:
        driver.quit()


def requested(driver: Any) -> list[str]:
    """The addresses requested since the last call; the driver must have been opened with `requests`."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def axe_violations(driver: Any, *tags: str) -> list[tuple[str, str, str]]:
    """What axe-core finds on the page under the rules with these tags: (rule, help, first element)."""
    driver.execute_script(files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8"))
    found = driver.execute_async_script(
        "const [tags, done] = arguments;"
        "axe.run(document, {runOnly: {type: 'tag', values: tags}}).then(done, e => done(String(e)));",
        list(tags),
    )
    assert isinstance(found, dict), found
    assert len(found["passes"]) > 10, "axe-core judged too little to mean anything"
    return [(v["id"], v["help"], v["nodes"][0]["html"][:200]) for v in found["violations"]]
