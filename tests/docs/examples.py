"""Commands of the documentation: where they are, how they are run, and which names they mention.

A fenced block of shell or Python runs as it is written, all blocks of a page in order in one folder. An HTML comment on
the line above a block changes that:

    <!-- not run: REASON -->     the block is not run, and the reason says why
    <!-- background: URL -->     its command runs until the end of the page; the next block waits for URL to answer
    <!-- until: PATTERN -->      the block is repeated until its output has the pattern
    <!-- file: NAME -->          the block's text is written to this file
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GENERATED = "reference"
SHELL = ("bash", "console", "sh")
MARKS = ("not run", "background", "until", "file")
PATIENCE = 600
"""Seconds that a server may take to answer, or a repeated command to print its pattern."""

_FENCE = re.compile(r"(?:^<!-- *([^\n]*?) *-->\n)?^```(\w+)[^\n]*\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        mark, note: kind and text of the comment above it; empty without one.
        language: the word behind the fence.
    """

    mark: str
    note: str
    language: str
    text: str

    @property
    def runnable(self) -> bool:
        """Whether the block holds commands: shell or Python."""
        return self.language in (*SHELL, "python")

    @property
    def script(self) -> str:
        """The commands of a shell block, without the prompts and output of `console`."""
        return "\n".join(commands(self.text)) if self.language == "console" else self.text


def pages() -> list[str]:
    """Return all pages that are written by hand, relative to the repository."""
    found = [path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != GENERATED]
    return ["README.md", "CONTRIBUTING.md", "recipes/README.md", *sorted(str(path.relative_to(ROOT)) for path in found)]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a page, each with its mark."""
    found = []
    for comment, language, body in _FENCE.findall(text):
        mark, _, note = comment.partition(":")
        known = mark in MARKS
        found.append(Block(mark if known else "", note.strip() if known else "", language, body))
    return found


def commands(console: str) -> list[str]:
    """Return the commands of a `console` block: what follows `$ `, to the end of its quotes and continued lines."""
    found: list[str] = []
    unfinished = False
    for line in console.splitlines():
        if line.startswith("$ "):
            found.append(line[2:])
        elif unfinished:
            found[-1] += f"\n{line}"
        unfinished = bool(found) and (found[-1].endswith("\\") or not _complete(found[-1]))
    return found


def mentions(text: str) -> Iterator[list[str]]:
    """Yield the words of every `proper ...` that a page mentions: in blocks of any kind, and in code spans."""
    outside = _FENCE.sub("", text)
    scripts = [block.script for block in blocks(text) if block.language in (*SHELL, "text", "ini")]
    indented = re.findall(r"^ {4}(proper .*(?:\\\n.*)*)", outside, flags=re.MULTILINE)
    spans = [span for span in _SPAN.findall(outside) if span.split()[:1] == ["proper"]]
    for script in [*scripts, *indented, *spans]:
        for line in re.sub(r"\\\n", " ", script).splitlines() if script not in spans else [" ".join(script.split())]:
            match = re.search(r"(?:^|[|;&] *|/bin/|-m )(proper [^|;&]*)", line)
            if match and _complete(match[1]):
                yield shlex.split(match[1], comments=True)[1:]


def cheap(block: Block) -> bool:
    """Whether a block takes seconds: it writes files, or calls `proper` only to check or to make data."""
    if block.language == "python":
        return False
    quick = ("check", "--version", "data from-git", "data list", "backbones list")
    calls = re.findall(r"^(?:\S+/)?(proper .*)$", block.script, flags=re.MULTILINE)
    return block.mark != "background" and all(call.removeprefix("proper ").startswith(quick) for call in calls)


def run(page: str, folder: Path, *, only_cheap: bool = False) -> str:
    """Run the blocks of a page in order in a folder and return what they printed.

    Args:
        only_cheap: stop before the first block that takes longer than seconds.

    Raises:
        AssertionError: a block failed.
    """
    port = str(free_port())
    printed = []
    with ExitStack() as servers:
        for block in blocks(read(page)):
            if block.mark == "not run" or not (block.runnable or block.mark == "file"):
                continue
            if only_cheap and block.mark != "file" and not cheap(block):
                break
            script = re.sub(r"\b8000\b", port, block.script)
            if block.mark == "file":
                (folder / block.note).write_text(block.text, encoding="utf-8")
            elif block.mark == "background":
                servers.enter_context(_background(script, folder, re.sub(r"\b8000\b", port, block.note)))
            else:
                printed.append(_finish(block, script, folder))
    return "".join(printed)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONWARNINGS": "ignore"}


def _finish(block: Block, script: str, folder: Path) -> str:
    """Run a block to its end, repeatedly if it is marked so, and return its output."""
    deadline = time.monotonic() + PATIENCE
    command = ["python", "-c", script] if block.language == "python" else ["bash", "-euo", "pipefail", "-c", script]
    while True:
        done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True)
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        if block.mark != "until" or re.search(block.note, done.stdout):
            return done.stdout + done.stderr
        assert time.monotonic() < deadline, f"{script}\nnever printed {block.note}: {done.stdout}"
        time.sleep(1)


@contextmanager
def _background(script: str, folder: Path, url: str) -> Iterator[None]:
    """Run a command until the end of the context; it has to answer at an address first."""
    with (folder / "background.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {script.strip()}"], cwd=folder, env=_environment(), stdout=log, stderr=log
        )
        try:
            _wait(process, url, folder / "background.log")
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
    raise AssertionError(f"{url} never answered: {log.read_text()}")


def _complete(command: str) -> bool:
    """Whether a command has no open quote."""
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return True
