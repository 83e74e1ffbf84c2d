"""One process at a time works in a run folder, and one that is killed leaves it free."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from proper.cli.app import main
from proper.errors import ProperError, RunFolderError
from proper.run_config import hold
from proper.run_folder import RunFolder
from proper.run_lock import exclusive

HOLD = """
import sys
from pathlib import Path
from proper.run_lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"path": str(tmp_path / "rows.jsonl")}}))
    return folder


@pytest.fixture
def holder(run: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that works in the run folder."""
    command = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


COMMANDS = (
    ["run", "{run}/config.yaml", "--out", "{run}"],
    ["evaluate", "{run}"],
    ["report", "{run}"],
    ["report", "{run}", "--user", "u1"],
    ["report", "{run}", "--compare", "{run}"],
)


@pytest.mark.parametrize(("before", "after"), [(0o755, 0o700), (0o750, 0o750)])
def test_a_folder_that_others_could_open_is_closed(run: Path, before: int, after: int) -> None:
    run.chmod(before)
    with exclusive(run):
        assert run.stat().st_mode & 0o777 == after


def test_a_second_process_is_told_who_works_there(
    run: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(run.iterdir())
    for command in COMMANDS:
        assert main([word.format(run=run) for word in command]) == 2
        said = f"proper: {run}: another process works in it (pid {holder.pid}); wait for it, or stop it\n"
        assert capsys.readouterr().err == said, command
    assert sorted(run.iterdir()) == before


def test_a_killed_process_leaves_the_folder_free(run: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (RunFolder(run).lock).read_text() == f"{holder.pid}\n"
    with exclusive(run):
        assert (RunFolder(run).lock).read_text() == f"{os.getpid()}\n"


def test_processes_of_one_launch_work_together(
    run: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with exclusive(run):
        pass


def test_the_lock_is_not_taken_through_a_link(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (RunFolder(run).lock).symlink_to(victim)
    assert main(["report", str(run)]) == 2
    assert "cannot be written" in capsys.readouterr().err and victim.read_text() == "precious"


def test_a_full_disk_is_one_line_that_names_the_folder(tmp_path: Path) -> None:
    """The lock itself takes no room, but the process's id in it does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(ProperError, match="cannot be written: File too large") as full, exclusive(tmp_path / "run"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert full.value.exit_code == 1


def test_an_unfinished_config_of_a_killed_run_does_not_take_its_folder(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.x1.tmp").mkdir()
    with hold(tmp_path):
        pass
    (tmp_path / ".letters.tmp").touch()
    with pytest.raises(RunFolderError, match="is not empty and not a run folder"), hold(tmp_path):
        pass
