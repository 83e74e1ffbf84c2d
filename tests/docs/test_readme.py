"""What README.md and CONTRIBUTING.md say works: commands, configs, records, Python, files and folders.

Fenced blocks are found by their language. The fast tests read every example; the slow one runs, in order, those that
need nothing but the demo's run folder.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from proper.cli.app import app
from proper.config import make_config
from proper.extras import EXTRAS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The contents of all fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str, program: str) -> list[list[str]]:
    """The words that follow `$ program` in console blocks."""
    lines = "".join(blocks(text, "console")).splitlines()
    words = [shlex.split(line.removeprefix("$ ")) for line in lines if line.startswith("$ ")]
    return [rest for first, *rest in words if first == program]


def on_the_demo(text: str) -> list[list[str]]:
    """Those that end by themselves; tests/serving starts the server."""
    return [words for words in commands(text, "proper") if "runs/demo" in words and words[0] != "serve"]


def test_there_are_examples_of_each_kind() -> None:
    assert commands(README, "make") == [["demo"], ["test"]]
    assert on_the_demo(README)[0][0] == "demo"
    assert blocks(README, "yaml")
    assert blocks(README, "jsonl")
    assert blocks(README, "python")


@pytest.mark.parametrize("words", commands(README + CONTRIBUTING, "proper"), ids=shlex.join)
def test_commands_parse(words: list[str]) -> None:
    command, (name, *rest) = typer.main.get_command(app), words
    while hasattr(command := command.commands[name], "commands"):  # type: ignore[attr-defined]
        name, *rest = rest
    command.make_context(name, rest)


@pytest.mark.parametrize("words", commands(README + CONTRIBUTING, "make"), ids=shlex.join)
def test_make_has_the_target(words: list[str]) -> None:
    assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("block", blocks(README, "yaml"))
def test_configs_are_valid_and_their_columns_are_in_the_records(block: str) -> None:
    config = make_config(yaml.safe_load(block), "README.md")
    for line in "".join(blocks(README, "jsonl")).splitlines():
        row = json.loads(line)
        assert {config.data.user, config.data.time} <= set(row)
        config.data.prompt.format_map(row)
        config.data.target.format_map(row)


@pytest.mark.parametrize("block", blocks(README, "python"))
def test_python_compiles(block: str) -> None:
    compile(block, "README.md", "exec")


def test_links_and_the_tree_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README + CONTRIBUTING):
        assert (ROOT / target).exists(), target
    folder = ROOT
    for line in "".join(blocks(README, "text")).splitlines():
        name = line.split()[0]
        folder = ROOT / "src" / "proper" if line.startswith(" ") else ROOT
        assert (folder / name).exists(), f"{folder.name}/{name}"


def test_every_extra_is_named() -> None:
    install = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    for extra in EXTRAS:
        assert f"`[{extra}]`" in README, extra
        assert re.search(rf"^\| `{extra}` \|", install, flags=re.MULTILINE), extra
