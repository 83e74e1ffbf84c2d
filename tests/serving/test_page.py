"""What is sent for `/`: a page of this server alone, under a policy that lets a browser ask nobody else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import proper

if TYPE_CHECKING:
    from tests.serving.conftest import Running

FOLDER = Path(proper.__file__).parent / "serving" / "page"


def test_the_page_and_its_parts(server: Running) -> None:
    with server.client() as client:
        page = client.get("/")
        assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
        named = re.findall(r'(?:href|src)="(page/[^"]+)"', page.text)
        assert named
        for part in FOLDER.iterdir():
            named += [f"page/{name}" for name in re.findall(r'from "\./([^"]+)"', part.read_text(encoding="utf-8"))]
        for name in set(named):
            part_reply = client.get(f"/{name}")
            assert part_reply.status_code == 200 and part_reply.content == (FOLDER / Path(name).name).read_bytes()
            policy = part_reply.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert {Path(name).name for name in named} | {"index.html"} == {part.name for part in FOLDER.iterdir()}
        for other in ("nothing.js", "..%2Fpage.py", "%2E%2E"):
            assert client.get(f"/page/{other}").status_code == 404


def test_nothing_is_from_elsewhere_or_inline() -> None:
    for part in FOLDER.iterdir():
        text = part.read_text(encoding="utf-8")
        assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write|localStorage|cookie", text), part
        assert "@import" not in text and "url(" not in text
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son[a-z]+=", html)


def test_the_page_is_no_part_of_the_api(server: Running) -> None:
    with server.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
    assert "/" not in paths and not any(path.startswith("/page") for path in paths)
