"""The answers of the playground: side by side with their gates, by token, for several users, stopped, refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Browser, expect

from tests.serving.playground.page import LATE, Playground, by_api, changed

if TYPE_CHECKING:
    from tests.serving.conftest import Running, Serve

pytestmark = pytest.mark.browser


def test_three_answers_with_their_gates(opened: Playground, served: Running) -> None:
    page = opened.page
    opened.pick("u3")
    expect(page.locator("#user-status")).to_contain_text("u3 has an own adapter, version 1")
    opened.write("Late", "The bus was late again.")
    assert page.locator("#sent").text_content() == LATE
    answers = opened.ask()
    assert answers == by_api(served, LATE, "u3")
    assert len(set(answers)) == 3
    expect(opened.column("population").locator(".gates")).to_be_hidden()
    expect(opened.column("population").locator(".pill")).to_have_text(["no experts"])
    expect(opened.column("groups").locator(".pill")).to_have_text(["own embedding"])
    expect(opened.column("users").locator(".pill")).to_have_text(["own adapter, version 1"])
    for tier in ("groups", "users"):
        bars = opened.column(tier).locator(".gates b")
        expect(bars).to_have_count(5)
        assert sum(int(text.rstrip("%")) for text in bars.all_text_contents()) == pytest.approx(100, abs=3)


def test_users_side_by_side(opened: Playground, served: Running) -> None:
    page, prompt = opened.page, LATE
    go = page.get_by_role("button", name="Compare users")
    page.get_by_label("Users to compare").fill("u1, u3,u5, u1,")
    go.click()
    expect(page.locator("#trouble")).to_have_text("The prompt is empty.")
    opened.write("Late", "The bus was late again.")
    page.get_by_label("Users to compare").fill(", ".join(f"u{at}" for at in range(7)))
    go.click()
    expect(page.locator("#trouble")).to_have_text("Type one to 6 user ids, separated by commas.")
    page.get_by_label("Users to compare").fill("u1, u3,u5, u1,")
    go.click()
    expect(page.locator("#compare-said")).not_to_be_empty()
    compared = page.locator("#compared article")
    assert compared.locator("h3").all_text_contents() == ["u1", "u3", "u5"]
    wanted = [by_api(served, prompt, user)[-1] for user in ("u1", "u3", "u5")]
    assert compared.locator(".answer").all_text_contents() == wanted and len(set(wanted)) == 3
    expect(compared.locator(".pill")).to_have_text(["own adapter, version 1"] * 3)
    # The chat route gives each user the same line.
    with served.client() as client:
        messages = [{"role": "user", "content": prompt}]
        replies = [
            client.post("/v1/chat/completions", json={"model": "tiny", "user": user, "messages": messages}).json()
            for user in ("u1", "u3", "u5")
        ]
    assert [reply["choices"][0]["message"]["content"] for reply in replies] == wanted


def test_pointing_at_a_token_shows_its_own_gates(opened: Playground) -> None:
    opened.pick("u3")
    opened.write("Late", "The bus was late again.")
    opened.ask()
    column = opened.column("users")
    whole = column.locator(".gates b").all_text_contents()
    seen = set()
    for token in column.locator(".token").all():
        token.hover()
        expect(column.locator("h4")).to_contain_text("Gates of")
        shown = column.locator(".gates b").all_text_contents()
        told = str(token.get_attribute("aria-label"))
        assert [part.split()[-1] for part in told.rpartition(": ")[2].split(", ")] == shown
        widths = column.locator(".track i").evaluate_all("bars => bars.map(bar => bar.style.width)")
        assert widths == shown
        seen.add(tuple(shown))
    assert len(seen) > 1
    opened.page.mouse.move(2, 2)
    expect(column.locator("h4")).to_have_text("Gates, mean of the answer")
    assert column.locator(".gates b").all_text_contents() == whole


def test_what_is_missing_or_refused_is_said_in_words(opened: Playground) -> None:
    page = opened.page
    alert = page.get_by_role("alert")
    page.get_by_role("button", name="Generate all three").click()
    expect(alert).to_have_text("The prompt is empty.")
    expect(page.locator("#prompt-field-0")).to_be_focused()
    assert page.locator("#prompt-field-0").get_attribute("aria-invalid") == "true"
    opened.write("Late", "The bus was late again.")
    assert page.locator("#prompt-field-0").get_attribute("aria-invalid") is None
    page.get_by_role("button", name="Add three interactions").click()
    expect(alert).to_contain_text("No user is chosen")
    opened.pick("u2")
    page.get_by_role("button", name="Add three interactions").click()
    expect(alert).to_have_text("An interaction needs a prompt and an answer.")
    expect(page.locator("#example-0-0")).to_be_focused()
    assert opened.trouble == []
    opened.write("Long", "word " * 300)
    page.get_by_role("button", name="Generate all three").click()
    expect(alert).to_contain_text("are longer than the 250 that fit.")
    opened.write("Late", "The bus was late again.")
    opened.context.set_offline(True)
    page.get_by_role("button", name="Generate all three").click()
    expect(alert).to_have_text("The server cannot be reached. Is it still running?")
    opened.context.set_offline(False)
    opened.ask()
    expect(alert).to_be_hidden()
    # A browser writes down every reply that is an error, and nothing else may be there.
    assert opened.trouble and all(line.startswith("Failed to load resource") for line in opened.trouble)
    opened.trouble.clear()


def test_stopping_keeps_what_is_there(browser: Browser, serve: Serve, long_run: Path, tmp_path: Path) -> None:
    running = serve(changed(long_run, tmp_path / "tiny", task={"max_new_tokens": 200}))
    opened = Playground(browser, running)
    opened.page.locator("#ask-fields textarea").fill("The bus was late again.")
    opened.page.evaluate(
        """new MutationObserver((_, watch) => {
            if (!document.querySelector(".token")) return;
            watch.disconnect();
            document.getElementById("stop").click();
        }).observe(document.getElementById("columns"), {childList: true, subtree: true})"""
    )
    opened.page.get_by_role("button", name="Generate all three").click()
    expect(opened.page.locator("#said")).to_have_text("Stopped.")
    expect(opened.page.locator("#stop")).to_be_hidden()
    expect(opened.column("users").locator(".pill")).to_contain_text(["stopped"])
    assert opened.trouble == []
    opened.context.close()


def test_a_run_without_users(browser: Browser, serve: Serve, tiny_run: Path, tmp_path: Path) -> None:
    folder = changed(tiny_run, tmp_path / "tiny")
    for stage in ("users", "groups"):
        (folder / stage / "stage.json").unlink()
    opened = Playground(browser, serve(folder))
    expect(opened.page.get_by_role("alert")).to_contain_text("This run has no stage 'users' yet")
    expect(opened.page.locator("#teach")).to_be_hidden()
    opened.page.locator("#ask-fields textarea").fill("The bus was late again.")
    answers = opened.ask()
    assert len(set(answers)) == 1 and answers[0]
    assert opened.trouble == []
    opened.context.close()
