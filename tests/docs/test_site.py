"""The documentation site builds strictly, offline, and each page and link of it leads somewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
INPUTS = ("docs", "zensical.toml", "CONTRIBUTING.md", "CHANGELOG.md", "scripts/docs_math.py")


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a copy of the documentation, as `make docs` does, without a proxy to the network."""
    dead = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    environment = os.environ | dead | {"PYTHONPATH": "scripts", "NO_COLOR": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def copy_inputs(folder: Path) -> Path:
    for name in INPUTS:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_inputs(tmp_path_factory.mktemp("docs"))
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


class References(HTMLParser):
    """Collects the addresses that a page loads (scripts, styles, images) and those that it links to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if "src" in values:
            self.loads.append(values["src"])
        if tag == "link" and "href" in values:
            self.loads.append(values["href"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])


def nav_pages(entry: Any) -> Iterator[str]:
    """The pages of a navigation, in order."""
    if isinstance(entry, str):
        yield entry
    for inner in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
        yield from nav_pages(inner)


def test_every_page_is_in_the_navigation_once() -> None:
    project = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    pages = list(nav_pages(project["nav"]))
    assert sorted(pages) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_pages_load_nothing_from_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        assert not [load for load in References(page).loads if urlsplit(load).netloc], page.name


def test_links_within_the_site_lead_to_files(site: Path) -> None:
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # its addresses start at the root of a host
            continue
        found = References(page)
        for address in found.loads + found.links:
            parts = urlsplit(address)
            if not parts.scheme and not parts.netloc and parts.path:
                assert (page.parent / unquote(parts.path)).is_file(), f"{page.relative_to(site)}: {address}"


def test_equations_are_mathml(site: Path) -> None:
    page = (site / "method.html").read_text(encoding="utf-8")
    assert page.count("<math ") >= 5
    assert "\\sum" not in page


@pytest.mark.parametrize("line", ["[broken](missing.md)", "[broken](method.md#no-such-heading)"])
def test_a_broken_link_fails_the_build(tmp_path: Path, line: str) -> None:
    folder = copy_inputs(tmp_path)
    with (folder / "docs" / "faq.md").open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    done = build(folder)
    assert done.returncode != 0
    assert "faq.md" in done.stdout + done.stderr
