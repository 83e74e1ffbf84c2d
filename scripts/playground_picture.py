"""Take docs/playground.png: one prompt answered as several users of a run, on the page that `proper serve` shows.

python scripts/playground_picture.py http://127.0.0.1:8000 u1 u2 u3 --field Body="..." --out docs/playground.png
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import expect, sync_playwright


def take(address: str, users: list[str], fields: dict[str, str], out: Path) -> list[str]:
    """Fill the fields, compare the users, write the picture, and return the users' answers."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900}, device_scale_factor=2)
        page.goto(address)
        go = page.get_by_role("button", name="Compare users")
        expect(go).to_be_enabled(timeout=60_000)
        for label, text in fields.items():
            page.locator("#ask-fields").get_by_label(label).fill(text)
        page.get_by_label("Users to compare").fill(", ".join(users))
        go.click()
        expect(page.locator("#compare-said")).not_to_be_empty(timeout=300_000)
        page.locator("#compare").screenshot(path=out)
        answers = page.locator("#compared .answer").all_text_contents()
        browser.close()
    return answers


def main() -> None:
    """Take the picture and print the answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="address of a running server")
    parser.add_argument("users", nargs="+", help="user ids, six at most")
    parser.add_argument("--field", action="append", default=[], metavar="NAME=TEXT", help="a field of the prompt")
    parser.add_argument("--out", type=Path, default=Path("docs/playground.png"))
    given = parser.parse_args()
    fields = dict(each.split("=", 1) for each in given.field)
    for user, answer in zip(given.users, take(given.address, given.users, fields, given.out), strict=True):
        print(f"{user}: {answer}")


if __name__ == "__main__":
    main()
