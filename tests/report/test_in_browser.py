"""The page in a real Chromium: no error, every plot drawn, readable on a phone and on a desk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import samples
from browser import Browser, chromium
from test_page import everything_evil

from aerogel.report import render

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        chromium() is None,
        reason="no Chromium is installed (apt-get install chromium, or set AEROGEL_CHROMIUM)",
    ),
]
PHONE, DESK = 390, 1440


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as opened:
        yield opened


@pytest.fixture(autouse=True)
def _no_errors(browser: Browser) -> Iterator[None]:
    browser.errors.clear()
    yield
    assert browser.errors == []


def write(folder: Path, results: dict[str, Any]) -> tuple[Path, int]:
    page = render(results)
    start = page.index('id="plots">') + len('id="plots">')
    plots = json.loads(page[start : page.index("</script>", start)])
    (folder / "report.html").write_text(page, encoding="utf-8")
    return folder / "report.html", len(plots)


def drawn(browser: Browser) -> dict[str, Any]:
    """What a reader sees: plots with something in them, and whether the page is too wide."""
    found = browser.evaluate(
        """({
          plots: [...document.querySelectorAll(".plot")]
            .filter((plot) => plot.querySelector("svg.main-svg .trace")).length,
          failed: document.querySelectorAll(".plot.failed").length,
          wide: document.documentElement.scrollWidth - window.innerWidth,
          width: window.innerWidth,
          beyond: [...document.querySelectorAll("main *, header *")]
            .filter((e) => !e.closest(".scroll, pre, svg") &&
                           e.getBoundingClientRect().right > window.innerWidth + 0.5)
            .map((e) => e.className || e.tagName),
          smallest: Math.min(...[...document.querySelectorAll("p, li, dd, td, svg text")]
            .filter((e) => e.textContent.trim() && e.getClientRects().length)
            .map((e) => parseFloat(getComputedStyle(e).fontSize))),
        })"""
    )
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_all_plots_are_drawn_and_nothing_overflows(browser, tmp_path, width, dark) -> None:
    page, expected = write(tmp_path, samples.results())
    browser.open(page, width, dark=dark)
    found = drawn(browser)
    assert found["width"] == width
    assert found["plots"] == expected == 11
    assert found["failed"] == 0
    assert found["wide"] <= 0
    assert found["beyond"] == []
    assert found["smallest"] >= 11


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_text_of_plots_stays_inside_them(browser, tmp_path, width) -> None:
    page, _ = write(tmp_path, samples.results())
    browser.open(page, width)
    cut = browser.evaluate(
        """[...document.querySelectorAll(".plot")].flatMap((plot) => {
          const box = plot.getBoundingClientRect();
          return [...plot.querySelectorAll("svg text")]
            .filter((t) => t.textContent.trim() && t.getClientRects().length)
            .map((t) => [t, t.getBoundingClientRect()])
            .filter(([t, r]) => r.left < box.left - 1 || r.right > box.right + 1 ||
                                r.bottom > box.bottom + 1)
            .map(([t]) => plot.id + ": " + t.textContent);
        })"""
    )
    assert cut == []


def test_text_is_readable_against_its_background(browser, tmp_path) -> None:
    """WCAG AA: a contrast of 4.5 for text, in both themes."""
    page, _ = write(tmp_path, samples.results())
    for dark in (False, True):
        browser.open(page, DESK, dark=dark)
        worst = browser.evaluate(
            """(() => {
              const style = getComputedStyle(document.documentElement);
              const light = (name) => {
                const hex = style.getPropertyValue(name).trim().slice(1);
                const part = (i) => { const v = parseInt(hex.slice(i, i + 2), 16) / 255;
                  return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
                return 0.2126 * part(0) + 0.7152 * part(2) + 0.0722 * part(4);
              };
              const contrast = (a, b) => {
                const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
                return (x + 0.05) / (y + 0.05);
              };
              return Math.min(...["--ink", "--muted", "--accent"].flatMap((text) =>
                ["--page", "--card", "--accent-soft"].map((back) => contrast(text, back))));
            })()"""
        )
        assert worst >= 4.5


def test_hostile_text_runs_no_code(browser, tmp_path) -> None:
    page, expected = write(tmp_path, everything_evil(samples.results()))
    browser.open(page, PHONE)
    found = drawn(browser)
    assert found["plots"] == expected
    assert found["wide"] <= 0
    assert browser.evaluate("document.querySelectorAll('img, a[href^=javascript]').length") == 0


def test_a_page_without_plots_opens(browser, tmp_path) -> None:
    page, expected = write(tmp_path, {"title": "cut short"})
    browser.open(page, PHONE)
    assert expected == drawn(browser)["plots"] == 0


def test_plots_follow_a_change_of_width_and_theme(browser, tmp_path) -> None:
    page, expected = write(tmp_path, samples.results())
    browser.open(page, DESK)
    before = browser.evaluate("document.querySelector('.tick text, .ytick text').style.fill")
    browser.call("Emulation.setDeviceMetricsOverride", width=PHONE, height=844,
                 deviceScaleFactor=1, mobile=True)  # fmt: skip
    browser.call("Emulation.setEmulatedMedia",
                 features=[{"name": "prefers-color-scheme", "value": "dark"}])  # fmt: skip
    settled = "new Promise((done) => setTimeout(() => done(true), 1500))"
    browser.call("Runtime.evaluate", expression=settled, awaitPromise=True)
    found = drawn(browser)
    assert (found["plots"], found["wide"]) == (expected, 0)
    after = browser.evaluate("document.querySelector('.xtick text').style.fill")
    assert after != before
