"""The playground as a test uses it: the page in a browser, a run with a template, and the answers over HTTP."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from playwright.sync_api import Browser, Page, expect

if TYPE_CHECKING:
    from tests.serving.conftest import Running

TIERS = ("population", "groups", "users")
TEMPLATE = {
    "data": {"prompt": "Title: {title}\nText: {text}\nTag:", "target": "{tag}"},
    # What a run without an answer of its own makes of any prompt is long enough to have tokens to point at.
    "task": {"max_new_tokens": 12},
}
LATE = "Title: Late\nText: The bus was late again.\nTag:"


def changed(folder: Path, to: Path, **settings: dict[str, Any]) -> Path:
    """A copy of a run, its store its own, with other settings."""
    shutil.copytree(folder, to)
    raw = yaml.safe_load((to / "config.yaml").read_text(encoding="utf-8"))
    for section, values in settings.items():
        raw[section] = {**raw.get(section, {}), **values}
    (to / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    return to


class Playground:
    """The page in a browser, and what went wrong on it."""

    def __init__(self, browser: Browser, running: Running, width: int = 1200, scheme: str = "light") -> None:
        self.running, self.trouble = running, list[str]()
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
        self.page: Page = self.context.new_page()
        self.page.on("console", lambda message: self.trouble.append(message.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("request", lambda request: self._asked(request.url))
        self.page.goto(running.url)

    def _asked(self, url: str) -> None:
        if not url.startswith(f"{self.running.url}/") and url != "data:,":
            self.trouble.append(url)

    def pick(self, user: str) -> None:
        self.page.get_by_role("combobox").fill(user)
        self.page.get_by_role("option", name=user).first.click()

    def write(self, *texts: str) -> None:
        """Fill the columns of the template."""
        for name, text in zip(("Title", "Text"), texts, strict=True):
            self.page.locator("#ask-fields").get_by_label(name).fill(text)

    def ask(self) -> list[str]:
        """Press the button, and return the three answers when they are whole."""
        self.page.get_by_role("button", name="Generate all three").click()
        return self.answers()

    def answers(self) -> list[str]:
        expect(self.page.locator("#said")).not_to_be_empty()
        return [str(self.page.locator(f"article:has(#column-{tier}) .answer").text_content()) for tier in TIERS]

    def column(self, tier: str) -> Any:
        return self.page.locator(f"article:has(#column-{tier})")


def by_api(running: Running, prompt: str, user: str | None) -> list[str]:
    """The three answers as another client gets them."""
    body = {"model": "tiny", "prompt": prompt, **({} if user is None else {"user": user})}
    with running.client() as client:
        replies = [client.post("/v1/completions", json={**body, "proper": {"tier": tier}}).json() for tier in TIERS]
    return [reply["choices"][0]["text"] for reply in replies]
