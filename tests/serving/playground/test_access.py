"""The playground before it is ready, and with API keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Browser, Route, expect

from tests.serving.playground.page import Playground, changed

if TYPE_CHECKING:
    from tests.serving.conftest import Running, Serve

pytestmark = pytest.mark.browser


def test_nothing_can_be_typed_or_pressed_before_the_page_is_ready(browser: Browser, served: Running) -> None:
    context = browser.new_context()
    page, held = context.new_page(), list[Route]()
    page.route("**/v1/models", lambda route: held.append(route))
    page.goto(served.url)
    expect(page.locator("article")).to_have_count(3)  # the script has run and waits for the server
    for name in ("#user-id", "#ask", "#teach-go"):
        expect(page.locator(name)).to_be_disabled()
    held[0].continue_()
    page.get_by_role("combobox").fill("ann")
    page.keyboard.press("Enter")
    expect(page.locator("#user-status")).to_contain_text("ann is new")
    context.close()


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Browser, serve: Serve, long_run: Path, tmp_path: Path) -> None:
    running = serve(changed(long_run, tmp_path / "tiny"))
    secret = running.keys.add("", ["generate", "write", "admin"])
    opened = Playground(browser, running)
    page = opened.page
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type("proper-wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("The server requires another API key.")
    page.locator("#key").fill(secret)
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#locked")).to_be_hidden()
    page.locator("#ask-fields textarea").fill("The bus was late again.")
    opened.pick("u1")
    opened.ask()
    expect(opened.column("users").locator(".pill")).to_have_text(["own adapter, version 1"])
    assert page.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie]") == [[secret], 0, ""]
    assert all("401" in line for line in opened.trouble) and len(opened.trouble) == 2
    page.get_by_role("button", name="Forget it").click()
    expect(page.locator("#key")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0
    opened.context.close()


def test_a_key_that_may_only_generate(browser: Browser, serve: Serve, long_run: Path, tmp_path: Path) -> None:
    running = serve(changed(long_run, tmp_path / "tiny"))
    secret = running.keys.add("", ["generate"])
    opened = Playground(browser, running)
    opened.page.locator("#key").fill(secret)
    opened.page.keyboard.press("Enter")
    expect(opened.page.locator("#locked")).to_be_hidden()
    opened.page.get_by_role("combobox").fill("u1")
    expect(opened.page.get_by_role("alert")).to_have_text("This key may not do that: this key lacks the scope admin.")
    opened.page.keyboard.press("Enter")
    opened.page.locator("#ask-fields textarea").fill("The bus was late again.")
    opened.ask()
    expect(opened.column("users").locator(".pill")).to_have_text(["own adapter, version 1"])
    opened.context.close()
