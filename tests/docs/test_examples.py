"""Every command of the documentation is run by a test or says why not, and names only what exists."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from proper.cli.app import app
from tests.docs import examples

HERE = Path(__file__).parent


def _git_repository(folder: Path) -> None:
    """Four authors of fourteen commits each, and the rows of a new user: what README.md expects to find."""
    body = "because this change has a reason that takes at least a dozen words to say in full"
    stream = "".join(
        f"commit refs/heads/main\ncommitter A{at % 4} <a{at % 4}@example.org> {10**9 + at * 60} +0000\n"
        f"data <<END\nTitle {at}\n\n{body} {at}\nEND\n"
        for at in range(4 * 14)
    )
    subprocess.run(["git", "init", "-q", "-b", "main"], check=True, cwd=folder)
    subprocess.run(["git", "fast-import", "--quiet"], input=stream.encode(), check=True, cwd=folder)
    rows = [json.dumps({"body": f"{body} {at}", "subject": f"Cleo {at}"}) + "\n" for at in range(100, 106)]
    (folder / "cleo.jsonl").write_text("".join(rows[:5]), encoding="utf-8")
    (folder / "more.jsonl").write_text(rows[5], encoding="utf-8")


PREPARE: dict[str, Callable[[Path], None]] = {"README.md": _git_repository}
"""What lies in the folder of a page before its first block, beside a run folder."""

NAMED = re.compile(r"\b(?:configs|recipes|scripts|deploy|experiments|tests)/[\w./-]*\w")
"""Paths of files in the repository."""

RUN = [
    "README.md",
    "docs/install.md",
    "docs/tutorial.md",
    "docs/serving.md",
    "docs/how-to/serve.md",
    "docs/how-to/enrol-and-delete.md",
    "docs/how-to/user-data.md",
    "docs/how-to/backbone.md",
    "docs/how-to/data.md",
    "docs/how-to/many-users.md",
    "docs/how-to/export.md",
]
"""Pages of which every block without a mark is run by the slow test."""

MAKES_ITS_RUN = ("README.md", "docs/install.md", "docs/tutorial.md", "docs/how-to/backbone.md", "docs/how-to/data.md")
CHECKED = ("README.md", "docs/tutorial.md")


@pytest.mark.parametrize("page", examples.pages())
def test_a_block_is_run_or_says_why_not(page: str) -> None:
    for block in examples.blocks(examples.read(page)):
        if block.mark == "not run":
            assert len(block.note.split()) >= 2, f"{page}: a reason is missing above\n{block.text}"
        elif block.runnable:
            assert page in RUN, f"{page}: no test runs this block, and no mark says why:\n{block.text}"


def test_pages_that_are_run_have_something_to_run() -> None:
    for page in RUN:
        found = examples.blocks(examples.read(page))
        assert any(block.runnable and block.mark != "not run" for block in found), page


@pytest.mark.parametrize("page", examples.pages())
def test_commands_and_options_exist(page: str) -> None:
    for words in examples.mentions(examples.read(page)):
        assert _known(words), f"{page}: proper {' '.join(words)}"


def _known(words: list[str]) -> bool:
    """Whether the command and its options exist; words in capitals and `...` stand for anything."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands"):
        if not rest or rest[0] == "..." or rest[0].isupper() or rest[0] in ("--version", "--help"):
            return True
        names = rest.pop(0).split("|")
        if any(name not in command.commands for name in names):
            return False
        command = command.commands[names[0]]
    options = {spelling for one in command.params for spelling in (*one.opts, *one.secondary_opts)} | {"--help"}
    return all(word.partition("=")[0] in options for word in rest if word.startswith("--"))


def test_files_that_the_documentation_and_the_help_name_exist() -> None:
    root, found = HERE.parents[1], set[str]()
    pages = [
        root / "README.md",
        root / "CONTRIBUTING.md",
        *(root / "docs").rglob("*.md"),
        *(root / "src").rglob("*.py"),
    ]
    for page in pages:
        if page.parent.name != "releases":  # which tell of files of their time
            found |= set(NAMED.findall(page.read_text(encoding="utf-8")))
    assert len(found) > 50
    assert [name for name in sorted(found) if not (root / name).exists()] == []


@pytest.mark.parametrize(
    "words", [["nothing"], ["users", "rename"], ["run", "CONFIG", "--nothing"], ["users", "list|rename", "DIR"]]
)
def test_unknown_names_are_found(words: list[str]) -> None:
    assert not _known(words)


def test_a_page_is_read_as_it_is_written() -> None:
    text = (
        "Use `proper users\ncheck --repair` or `proper-nano`.\n\n<!-- not run: needs a GPU -->\n```bash\n"
        "proper run A \\\n  --out B\n```\n\n"
        "```console\n$ proper report 'runs/\nx'\noutput\n$ cd runs && proper check c.yaml\n```\n"
    )
    gpu, console = examples.blocks(text)
    assert (gpu.mark, gpu.note) == ("not run", "needs a GPU")
    assert console.script == "proper report 'runs/\nx'\ncd runs && proper check c.yaml"
    assert sorted(examples.mentions(text)) == [
        ["check", "c.yaml"],
        ["run", "A", "--out", "B"],
        ["users", "check", "--repair"],
    ]


@pytest.mark.parametrize("page", CHECKED)
def test_a_page_runs_as_far_as_its_check(page: str, tmp_path: Path) -> None:
    PREPARE.get(page, lambda _: None)(tmp_path)
    printed = examples.run(page, tmp_path, only_cheap=True)
    assert "leaks     0" in printed, printed


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder of the demo, with fewer users than its default; their ids have three digits too."""
    folder = tmp_path_factory.mktemp("demo") / "runs" / "demo"
    command = [sys.executable, "-m", "proper", "demo", "--users", "100", "--out", str(folder)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONWARNINGS": "ignore"}, capture_output=True)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", RUN)
def test_a_page_runs_as_written(page: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if page not in MAKES_ITS_RUN:
        shutil.copytree(request.getfixturevalue("demo_run"), tmp_path / "runs" / "demo")
    PREPARE.get(page, lambda _: None)(tmp_path)
    assert examples.run(page, tmp_path).strip()
