"""The playground in a real browser: every action, by mouse and by keyboard alone, on a desktop and on a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from playwright.sync_api import Browser, Page, Route, expect

if TYPE_CHECKING:
    from tests.serving.conftest import Running, Serve

pytestmark = pytest.mark.browser
TIERS = ("population", "groups", "users")
# What a run without an answer of its own makes of any prompt is long enough to have tokens to point at.
TOKENS = 12


def changed(folder: Path, to: Path, **settings: dict[str, Any]) -> Path:
    """A copy of a run, its store its own, with other settings."""
    shutil.copytree(folder, to)
    raw = yaml.safe_load((to / "config.yaml").read_text(encoding="utf-8"))
    for section, values in settings.items():
        raw[section] = {**raw.get(section, {}), **values}
    (to / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    return to


@pytest.fixture(scope="module")
def served(serve: Serve, long_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Running:
    folder = tmp_path_factory.mktemp("page") / "tiny"
    prompt = {"prompt": "Title: {title}\nText: {text}\nTag:", "target": "{tag}"}
    return serve(changed(long_run, folder, data=prompt, task={"max_new_tokens": TOKENS}))


class Opened:
    """The page, and what went wrong on it."""

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


@pytest.fixture
def opened(browser: Browser, served: Running) -> Iterator[Opened]:
    one = Opened(browser, served)
    yield one
    one.context.close()
    assert one.trouble == []


def by_api(running: Running, prompt: str, user: str | None) -> list[str]:
    """The three answers as another client gets them."""
    body = {"model": "tiny", "prompt": prompt, **({} if user is None else {"user": user})}
    with running.client() as client:
        replies = [client.post("/v1/completions", json={**body, "proper": {"tier": tier}}).json() for tier in TIERS]
    return [reply["choices"][0]["text"] for reply in replies]


def test_three_answers_with_their_gates(opened: Opened, served: Running) -> None:
    page = opened.page
    opened.pick("u3")
    expect(page.locator("#user-status")).to_contain_text("u3 has an own adapter, version 1")
    opened.write("Late", "The bus was late again.")
    assert page.locator("#sent").text_content() == "Title: Late\nText: The bus was late again.\nTag:"
    answers = opened.ask()
    assert answers == by_api(served, "Title: Late\nText: The bus was late again.\nTag:", "u3")
    assert len(set(answers)) == 3
    expect(opened.column("population").locator(".gates")).to_be_hidden()
    expect(opened.column("population").locator(".pill")).to_have_text(["no experts"])
    expect(opened.column("groups").locator(".pill")).to_have_text(["own embedding"])
    expect(opened.column("users").locator(".pill")).to_have_text(["own adapter, version 1"])
    for tier in ("groups", "users"):
        bars = opened.column(tier).locator(".gates b")
        expect(bars).to_have_count(5)
        assert sum(int(text.rstrip("%")) for text in bars.all_text_contents()) == pytest.approx(100, abs=3)


def test_users_side_by_side(opened: Opened, served: Running) -> None:
    page, prompt = opened.page, "Title: Late\nText: The bus was late again.\nTag:"
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


def test_pointing_at_a_token_shows_its_own_gates(opened: Opened) -> None:
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


def test_by_keyboard_alone(opened: Opened, served: Running) -> None:
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
    assert opened.answers() == by_api(served, "Title: Late\nText: The bus was late again.\nTag:", "u1")
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


def test_a_new_id_is_a_new_user(opened: Opened) -> None:
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


def test_deleting_asks_first(opened: Opened, served: Running) -> None:
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
    prompt = {"prompt": "Title: {title}\nText: {text}\nTag:", "target": "{tag}"}
    running = serve(changed(long_run, tmp_path / "tiny", data=prompt, task={"max_new_tokens": TOKENS}), fits=True)
    opened = Opened(browser, running)
    page, asked = opened.page, "Title: Late\nText: The bus was late again.\nTag:"

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


def test_what_is_missing_or_refused_is_said_in_words(opened: Opened) -> None:
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
    opened = Opened(browser, running)
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


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Browser, serve: Serve, long_run: Path, tmp_path: Path) -> None:
    running = serve(changed(long_run, tmp_path / "tiny"))
    secret = running.keys.add("", ["generate", "write", "admin"])
    opened = Opened(browser, running)
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
    opened = Opened(browser, running)
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


def test_a_run_without_users(browser: Browser, serve: Serve, tiny_run: Path, tmp_path: Path) -> None:
    folder = changed(tiny_run, tmp_path / "tiny")
    for stage in ("users", "groups"):
        (folder / stage / "stage.json").unlink()
    opened = Opened(browser, serve(folder))
    expect(opened.page.get_by_role("alert")).to_contain_text("This run has no stage 'users' yet")
    expect(opened.page.locator("#teach")).to_be_hidden()
    opened.page.locator("#ask-fields textarea").fill("The bus was late again.")
    answers = opened.ask()
    assert len(set(answers)) == 1 and answers[0]
    assert opened.trouble == []
    opened.context.close()


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


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (390, "dark"), (320, "light")])
def test_readable_and_named(browser: Browser, served: Running, width: int, scheme: str) -> None:
    opened = Opened(browser, served, width, scheme)
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
