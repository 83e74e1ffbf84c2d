"""What README.md and CONTRIBUTING.md say works: commands, configs, records, Python, files and folders.

Fenced blocks are found by their language. The fast tests read every example; the slow one runs, in order, those that
need nothing but the demo's run folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from proper.cli.app import app, main
from proper.config import make_config

ROOT = Path(__file__).parents[1]
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


def test_the_import_direction_is_the_one_that_is_checked() -> None:
    import tomllib

    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert [re.sub(r"[()]", "", layer) for layer in layers] == blocks(CONTRIBUTING, "text")[0].splitlines()


def test_the_example_on_a_git_repository_runs_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As far as `check`, which needs what `run` needs: a data set, a config and enough interactions per user."""
    monkeypatch.chdir(tmp_path)
    body = "because this change has a reason that takes at least a dozen words to say in full"
    stream = "".join(
        f"commit refs/heads/main\ncommitter A{at % 4} <a{at % 4}@example.org> {10**9 + at * 60} +0000\n"
        f"data <<END\nTitle {at}\n\n{body} {at}\nEND\n"
        for at in range(4 * 14)
    )
    subprocess.run(["git", "init", "-q", "-b", "main"], check=True)
    subprocess.run(["git", "fast-import", "--quiet"], input=stream.encode(), check=True)
    (config,) = blocks(README, "yaml")
    Path("commits.yaml").write_text(config, encoding="utf-8")
    for words in commands(README, "proper"):
        if words[0] == "check" or words[:2] == ["data", "from-git"]:
            assert main(words) == 0, shlex.join(words)
    out = capfd.readouterr().out
    assert out.startswith("commits.parquet\n") and re.search(r"^users +4\b", out, flags=re.MULTILINE), out


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_s_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in on_the_demo(README):
        assert main(words) == 0, shlex.join(words)
        said = capfd.readouterr()
        assert (said.out + said.err).strip(), f"{shlex.join(words)} says nothing"
    for block in blocks(README, "python"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, "README.md", "exec"), {})
        assert printed.getvalue().strip()
