"""The users of the playground: a new id, teaching, deleting."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import Browser, expect

from tests.serving.playground.page import LATE, TEMPLATE, TIERS, Playground, by_api, changed

if TYPE_CHECKING:
    from tests.serving.conftest import Running, Serve

pytestmark = pytest.mark.browser


def test_a_new_id_is_a_new_user(opened: Playground) -> None:
    page = opened.page
    page.get_by_role("combobox").fill("zoë/1 %")
    expect(page.get_by_role("option")).to_have_text(["zoë/1 %new user"])
    page.keyboard.press("Enter")
    expect(page.locator("#user-status")).to_contain_text("zoë/1 % is new")
    expect(page.locator("#delete")).to_be_disabled()
    opened.write("Late", "The bus was late again.")
    opened.ask()
    expect(opened.column("users").locator(".pill")).to_contain_text(["unknown user"])
    # A known one by their whole id, without the list.
    page.get_by_role("combobox").fill("group")
    page.keyboard.press("Enter")
    expect(page.locator("#user-status")).to_contain_text("group has an own embedding and no adapter")


def test_deleting_asks_first(opened: Playground, served: Running) -> None:
    page = opened.page
    opened.pick("u7")
    expect(page.locator("#delete")).to_be_enabled()
    page.locator("#delete").click()
    dialog = page.get_by_role("dialog", name="Delete u7?")
    expect(dialog).to_be_visible()
    expect(page.locator("#sure-no")).to_be_focused()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    with served.client() as client:
        assert client.get("/v1/users/u7").status_code == 200
        page.locator("#delete").click()
        dialog.get_by_role("button", name="Delete permanently").click()
        expect(page.locator("#user-status")).to_have_text("u7 is deleted.")
        assert client.get("/v1/users/u7").status_code == 404
    expect(page.locator("#user-id")).to_be_focused()
    page.get_by_role("combobox").fill("u7")
    expect(page.get_by_role("option")).to_have_text(["u7new user"])


@pytest.mark.slow
def test_teaching_shows_before_and_after(browser: Browser, serve: Serve, long_run: Path, tmp_path: Path) -> None:
    running = serve(changed(long_run, tmp_path / "tiny", **TEMPLATE), fits=True)
    opened = Playground(browser, running)
    page, asked = opened.page, LATE

    def taught(user: str) -> Any:
        """Teach what is written, wait for the answers after it, and return what the server knows of the person."""
        before = by_api(running, asked, user)
        page.get_by_role("button", name="Add three interactions").click()
        expect(page.get_by_role("progressbar")).to_be_visible()
        expect(page.locator("#said")).to_contain_text("hanged", timeout=90_000)
        after = by_api(running, asked, user)
        assert opened.answers() == after
        expect(page.locator("#fit-status")).to_contain_text("Fitted, 100%")
        assert page.get_by_role("progressbar").evaluate("bar => bar.value") == 1
        for tier, was, now in zip(TIERS, before, after, strict=True):
            expect(opened.column(tier).locator(".before")).to_have_text(f"Before{was or '(an empty answer)'}")
            said = "same as before" if was == now else "changed"
            expect(opened.column(tier).locator(".pill").last).to_have_text(said)
        assert before[0] == after[0] and before[1:] != after[1:], "what was taught is theirs alone, and it shows"
        with running.client() as client:
            return client.get(f"/v1/users/{user}").json()

    page.get_by_role("combobox").fill("ann")
    page.keyboard.press("Enter")
    expect(page.locator("#user-status")).to_contain_text("ann is new")
    opened.write("Late", "The bus was late again.")
    for at in range(3):
        box = page.get_by_role("group", name=f"Interaction {at + 1}")
        box.get_by_label("Title").fill("Late")
        box.get_by_label("Text").fill(f"The bus was late again, {at}.")
        box.get_by_label("The user's answer").fill("travel")
    card = taught("ann")
    assert (card["interactions"], card["version"]) == (3, 1)
    expect(page.locator("#user-status")).to_contain_text("version 1, 3 interactions logged.")
    opened.pick("u5")
    expect(page.locator("#user-status")).to_contain_text("u5 has an own adapter, version 1")
    card = taught("u5")
    assert (card["interactions"], card["version"]) == (3, 2)
    page.get_by_role("combobox").fill("ann")
    page.keyboard.press("Enter")
    # At once: the server has not said yet who ann is, and u5 was chosen before.
    page.locator("#delete").click()
    expect(page.locator("#sure-who")).to_have_text("ann")
    page.get_by_role("button", name="Delete permanently").click()
    expect(page.locator("#user-status")).to_have_text("ann is deleted.")
    assert opened.trouble == []
    opened.context.close()
