"""A deletion that is killed anywhere is completed by the next command, and a search finds nothing of the user."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch

from proper.adapters.store import AdapterStore, UserRecord
from proper.cli.app import main
from proper.data.database import create
from proper.interactions.deletion import working
from proper.interactions.fingerprints import Fingerprints
from proper.interactions.log import InteractionLog, LogEntry
from proper.interactions.verification import fingerprint, verify

USER = "anna-17"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run and a further seed with texts, predictions, tensors and logged interactions of two users."""
    home = tmp_path / "run"
    for folder in (home, home / "seeds" / "1"):
        (folder / "predictions").mkdir(parents=True)
        (folder / "config.yaml").write_text("data: {path: x}\n")
        rows = [{"user": user, "prompt": f"{user} asks something long"} for user in (USER, "bo")]
        (folder / "predictions" / "users.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "users.json").write_text(json.dumps({"users": rows}))
        (folder / "report.html").write_text(f"<p>{USER}</p>")
        draw = torch.Generator().manual_seed(1)
        with closing(AdapterStore(folder / "users")) as store:
            for user in (USER, "bo"):
                adapter = {"x.A": torch.randn(4, 300, generator=draw)}
                store.put([UserRecord(user, "groups", torch.randn(8, generator=draw))])
                store.put([UserRecord(user, "users", torch.randn(8, generator=draw), adapter)])
    with closing(create(home / "data.sqlite")) as data:
        data.execute("INSERT INTO meta VALUES ('labels', '[]'), ('version', '1')")
        for row, user in enumerate((USER, "bo"), 1):
            data.execute("INSERT INTO users (number, id) VALUES (?, ?)", (row, user))
            data.execute("INSERT INTO texts VALUES (?, ?, 'y', NULL)", (row, f"{user} wrote this in the data"))
            data.execute("INSERT INTO rows VALUES (?, ?, ?, NULL, 2, x'00', NULL, 0, 'history', NULL)", (row, row, row))
    with closing(InteractionLog(home / "users")) as log:
        log.append("", USER, [LogEntry("She told the log about a harbour.", "x")])
        log.append("", "bo", [LogEntry("He told the log about a mountain.", "x")])
    return home


def check(run: Path, kills: int, seed: int) -> None:
    script = Path(__file__).with_name("killed_deletion.py")
    command = [sys.executable, str(script), str(run), str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    whole, *told = [json.loads(line) for line in done.stdout.splitlines()]
    assert (whole["exit"], whole["left"]) == (0, 0), "an undisturbed deletion leaves nothing"
    assert len(told) == kills and all(each["exit"] == -signal.SIGKILL for each in told)
    assert any(each["left"] for each in told), "kills come before the end"
    for each in told:
        assert (each["finished"], each["found"], each["pending"]) == (0, [], False), each


def test_a_deletion_killed_at_a_few_points_completes(run: Path) -> None:
    check(run, 3, seed=2)


@pytest.mark.slow
def test_a_deletion_killed_at_20_random_points_completes(run: Path) -> None:
    check(run, 20, seed=0)


def test_a_backup_does_not_bring_a_user_back(run: Path, tmp_path: Path) -> None:
    """All but the tombstones is put back as it was before the deletion."""
    with closing(AdapterStore(run / "users")) as store, closing(InteractionLog(run / "users")) as log:
        prints = fingerprint(store, log, USER, bytes(range(32)))
    backup = shutil.copytree(run, tmp_path / "backup")
    assert main(["users", "delete", str(run), "--user", USER]) == 0
    for restore in ("working", "check"):
        for name in ("users", "predictions", "data.sqlite", "users.json"):
            target, source = run / name, backup / name
            shutil.rmtree(target) if target.is_dir() else target.unlink()
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        assert not clean(run, prints)
        if restore == "working":
            with working(run):
                pass
        else:
            assert main(["users", "check", str(run)]) == 0
        assert clean(run, prints), restore
    with closing(AdapterStore(run / "users")) as store:
        assert [user for user, _ in store.users()] == ["bo"]


def clean(run: Path, prints: Fingerprints) -> bool:
    return verify(run, [(USER, prints)]).clean
