"""The playground by keyboard alone, and readable on a desktop and on a phone, light and dark."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Browser, expect

from tests.serving.playground.page import LATE, Playground, by_api

if TYPE_CHECKING:
    from tests.serving.conftest import Running

pytestmark = pytest.mark.browser


NARROW = "the-longest-id-that-anybody-ever-thought-of-" + "x" * 60
CONTRAST = """() => {
  const rgba = (text) => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, at) => sum + v * [.2126, .7152, .0722][at], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), poor = [];
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !element.checkVisibility() || element.closest(":disabled")) continue;
    const [a, b] = [light(rgba(getComputedStyle(element).color)), light(behind(element))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) poor.push([texts.currentNode.data.trim(), (a + .05) / (b + .05)]);
  }
  return poor;
}"""


def test_by_keyboard_alone(opened: Playground, served: Running) -> None:
    page = opened.page

    def focused() -> str:
        return str(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))

    expect(page.locator("#ask-fields textarea")).to_have_count(2)
    page.keyboard.press("Tab")
    assert focused() == "Skip to the prompt"
    page.keyboard.press("Tab")
    assert focused() == "user-id"
    page.keyboard.type("u")
    expect(page.get_by_role("option")).to_have_count(9)  # "u" itself would be new
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    active = page.locator("#user-id").get_attribute("aria-activedescendant")
    assert page.locator(f"#{active}").text_content() == "u1own adapter"
    page.keyboard.press("Enter")
    expect(page.locator("#user-id")).to_have_value("u1")
    expect(page.locator("#delete")).to_be_enabled()
    order = []
    for text in ("", "Late", "The bus was late again."):
        page.keyboard.press("Tab")
        order.append(focused())
        page.keyboard.type(text)
    assert order == ["delete", "prompt-field-0", "prompt-field-1"]
    page.keyboard.press("Control+Enter")
    assert opened.answers() == by_api(served, LATE, "u1")
    page.keyboard.press("Tab")  # the prompt as it is sent
    page.keyboard.press("Tab")
    assert focused() == "ask"
    page.keyboard.press("Tab")
    group = opened.column("groups").locator(".token")
    expect(group.first).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("ArrowRight")
    expect(group.nth(1)).to_be_focused()
    expect(opened.column("groups").locator("h4")).to_contain_text("Gates of")
    page.keyboard.press("End")
    expect(group.last).to_be_focused()
    page.keyboard.press("Tab")
    expect(opened.column("users").locator(".token").first).to_be_focused()
    order = []
    for _ in range(3):
        page.keyboard.press("Tab")
        order.append(focused())
    assert order == ["compare-ids", "compare-go", "example-0-0"]


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (390, "dark"), (320, "light")])
def test_readable_and_named(browser: Browser, served: Running, width: int, scheme: str) -> None:
    opened = Playground(browser, served, width, scheme)
    page = opened.page
    opened.pick("u0")
    opened.write("Late", "word " * 20 + "x" * 80)
    opened.ask()
    page.get_by_role("combobox").fill(NARROW)
    expect(page.get_by_role("option").first).to_be_visible()
    page.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CONTRAST) == []
    nodes = opened.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "textbox", "combobox", "listbox", "option", "link", "dialog", "progressbar", "article"}
    for node in nodes:
        if not node["ignored"] and node["role"]["value"] in roles:
            assert node["name"]["value"].strip(), node
    if width < 500:
        sizes = page.locator("button:visible").evaluate_all("all => all.map(one => one.offsetHeight)")
        assert min(size for size in sizes if size) >= 24
    page.emulate_media(reduced_motion="reduce")
    assert page.locator(".track i").first.evaluate("bar => getComputedStyle(bar).transitionDuration") == "0s"
    assert opened.trouble == []
    opened.context.close()
