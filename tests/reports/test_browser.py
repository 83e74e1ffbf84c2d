"""The report in a real browser, from a file: no error, nothing fetched, every figure drawn, no sideways scrolling."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from proper.reports import write_report
from proper.reports.compare import write_comparison
from proper.reports.user_page import write_user_pages

pytestmark = pytest.mark.browser


def opened(browser: Browser, folder: Path, width: int, scheme: str, path: Path | None = None) -> tuple[Page, list[str]]:
    """Open a page, the report if None; the list fills with errors, messages and requests for anything but itself."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    trouble: list[str] = []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    url = (path or write_report(folder)).as_uri()
    page.on("request", lambda request: None if request.url in (url, "data:,") else trouble.append(request.url))
    page.goto(url)
    return page, trouble


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_every_figure_is_drawn(browser: Browser, folder: Path, width: int, scheme: str) -> None:
    page, trouble = opened(browser, folder, width, scheme)
    drawings = page.locator("svg[role=img]")
    assert drawings.count() == 1 + 2 + 1 + 2 + 5  # stages, gains, heat map, maps, curves
    for index in range(drawings.count()):
        box = drawings.nth(index).bounding_box()
        assert box and box["width"] > 80 and box["height"] > 8
    for mark in ("mark", "interval", "bar", "dot", "cells", "line", "band"):
        boxes = page.locator(f"main .drawing .{mark} :is(path, use):not(defs *)").evaluate_all(
            "marks => marks.map(mark => mark.getBoundingClientRect()).map(box => Math.max(box.width, box.height))"
        )
        assert boxes and min(boxes) > 0, mark
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("window.hacked") is None
    assert trouble == []


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_a_user_and_two_runs_are_drawn(browser: Browser, folder: Path, width: int, scheme: str) -> None:
    row = {"method": "users", "metric": "accuracy", "primary": True, "higher_is_better": True, "difference": 0.1,
           "first": {"value": 0.6, "ci95": [0.5, 0.7]}, "second": {"value": 0.5, "ci95": [0.4, 0.6]},
           "ci95": [0.0, 0.2], "p_adjusted": 0.01, "users": 60, "queries": 300, "test": "paired"}  # fmt: skip
    compared, _ = write_comparison(folder, folder, {"rows": [row], "seeds": [[0, 0]]})
    for path, drawn in ((compared, 4), (write_user_pages(folder, ["u1"])[0], 3)):
        page, trouble = opened(browser, folder, width, scheme, path)
        drawings = page.locator("svg[role=img]")
        assert drawings.count() == drawn  # values, differences, two heat maps; strips, gates, the map
        for index in range(drawn):
            box = drawings.nth(index).bounding_box()
            assert box and box["width"] > 80 and box["height"] > 8
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert trouble == []


def test_hovering_names_the_user_and_the_values(browser: Browser, folder: Path) -> None:
    page, trouble = opened(browser, folder, 1200, "light")
    cell = page.locator("#routing .band path").first
    cell.scroll_into_view_if_needed()
    page.wait_for_timeout(100)  # the scroll's own event hides a tip
    cell.hover()
    tip = page.locator("#tip")
    assert tip.is_visible() and tip.inner_text().startswith("user ") and "expert 0: 0." in tip.inner_text()
    page.mouse.move(2, 2)
    assert not tip.is_visible()
    assert trouble == []


def test_text_can_be_read_on_a_phone(browser: Browser, folder: Path) -> None:
    page, _ = opened(browser, folder, 360, "light")
    names = page.locator("#stages .name").evaluate_all(
        "texts => texts.map(text => text.getBoundingClientRect()).map(box => [box.left, box.right])"
    )
    assert len(names) == 4
    assert all(left[1] < right[0] for left, right in zip(names, names[1:], strict=False)), "names overlap"
    assert names[0][0] >= 0 and names[-1][1] <= 360
