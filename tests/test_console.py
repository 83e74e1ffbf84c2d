"""Log messages and progress of the command line on stderr, and the silence of the library without it."""

from __future__ import annotations

import logging
import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from proper.console import progress, silent, terminal_logging

logger = logging.getLogger("proper.somewhere")


@pytest.fixture
def terminal() -> Iterator[None]:
    with terminal_logging():
        yield


def test_messages_go_to_stderr_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal_logging():
        logger.info("three users")
        logger.warning("100 %")
        logger.debug("detail")
    logger.info("later")
    assert capsys.readouterr() == ("", "three users\n100 %\n")


def test_a_program_that_does_not_configure_logging_sees_nothing() -> None:
    code = (
        "import logging, proper\n"
        "from proper.console import progress\n"
        "with progress('users', 1) as advance:\n"
        "    advance(); logging.getLogger('proper.training').warning('quarantined')\n"
    )
    for setup, shown in {
        "": "",
        "import logging; logging.basicConfig(level=logging.INFO, format='%(name)s %(message)s')\n": (
            "proper.training quarantined\nproper.console users: 1/1, 0 s\n"
        ),
    }.items():
        done = subprocess.run([sys.executable, "-c", setup + code], capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("", shown)


def test_messages_and_progress_can_be_silenced(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    with silent(), progress("users", 1) as advance:
        advance()
        logger.error("user 'ann'")
    logger.info("again")
    assert capsys.readouterr() == ("", "again\n")


def test_quick_work_is_one_plain_line(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("groups", 1000) as advance:
        for step in range(1000):
            advance(note=f"loss {step}")
    assert capsys.readouterr() == ("", "groups: 1000/1000, 0 s, loss 999\n")


def test_a_note_stays_until_the_next_and_the_total_may_be_unknown(
    terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("rows", None) as advance:
        advance(3, "file 1")
        advance(4)
    assert capsys.readouterr().err == "rows: 7, 0 s, file 1\n"


def test_slow_work_says_so_now_and_then(
    terminal: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proper.console._SECONDS_BETWEEN_LINES", 0.1)
    start = time.monotonic()
    with progress("users", 40) as advance:
        for _ in range(40):
            time.sleep(0.01)
            advance()
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 1 + (time.monotonic() - start) / 0.1
    assert lines[-1].startswith("users: 40/40, ")


@dataclass
class Clock:
    """A clock that a test sets."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now


def test_lines_say_how_long_the_rest_takes_at_the_measured_pace(
    terminal: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a resumed stage had done before does not count: the pace is that of the steps of this process."""
    clock = Clock()
    monkeypatch.setattr("proper.console.time", clock)
    with progress("groups", 136) as advance:
        advance(100)
        for _ in range(36):
            clock.now += 2
            advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "groups: 103/136, 6 s, about 66 s left"
    assert lines[1] == "groups: 106/136, 12 s, about 60 s left"
    assert lines[-1] == "groups: 136/136, 72 s"


def test_the_time_left_goes_by_the_share_of_the_work_where_units_end_together(
    terminal: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("proper.console.time", clock)
    with progress("users", 8) as advance:
        for step in range(1, 41):
            clock.now += 10
            advance(8 if step == 40 else 0, share=step / 40)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "users: 0/8, 20 s, about 6 min left"
    assert lines[38] == "users: 0/8, 390 s, about 10 s left"


def test_work_that_fails_does_not_say_that_it_ended(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), progress("users", 2) as advance:
        advance()
        raise ZeroDivisionError
    assert capsys.readouterr().err == ""


def test_on_a_terminal_it_is_a_bar_and_stdout_stays_clean() -> None:
    code = (
        "import logging\n"
        "from proper.console import progress, terminal_logging\n"
        "with terminal_logging(), progress('population [x]', 3) as advance:\n"
        "    advance(2, 'loss [1.5]'); logging.getLogger('proper.x').info('said [x]'); advance(1)\n"
        "print('result')\n"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment
    )
    os.close(theirs)
    shown = bytearray()
    # Read while it runs: a terminal that nobody reads fills up. Linux reports its end as an error.
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:
        pass
    os.close(ours)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out == "result\n"
    text = shown.decode()
    assert "population [x]" in text
    assert "3/3" in text
    assert "loss [1.5]" in text
    assert "said [x]" in text


_LOAD = """
import sys, tempfile
from proper.console import quiet_libraries
first = sys.argv[1]
if first == "before":
    quiet_libraries()
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
import datasets
if first == "after":
    quiet_libraries()
    # What they say while they are imported cannot be taken back.
    print("imported", file=sys.stderr)
with tempfile.TemporaryDirectory() as folder:
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)
    datasets.Dataset.from_dict({"x": [1, 2]}).map(lambda row: row).save_to_disk(folder)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("when", "quiet"), [("before", True), ("after", True), ("never", False)])
def test_libraries_are_quiet_before_and_after_they_are_imported(when: str, quiet: bool) -> None:
    done = subprocess.run([sys.executable, "-c", _LOAD, when], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == ""
    said = done.stderr.split("imported\n")[-1]
    assert (said == "") is quiet
