"""Processes that write to one users folder and are killed at random: no damage, nothing lost, nothing left."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from proper.adapters.integrity import check
from proper.adapters.store import AdapterStore
from proper.interactions.deletion import finish_deletions
from proper.interactions.log import InteractionLog
from proper.interactions.log_check import check_log


def stress(folder: Path, *options: float) -> dict[str, Any]:
    """Run `stressed_users.py`, check what it left, and return what it said."""
    (folder / "config.yaml").write_text("{}")
    users, script = folder / "users", Path(__file__).with_name("stressed_users.py")
    ended = subprocess.run([sys.executable, str(script), str(users), *map(str, options)], capture_output=True)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr.decode()
    said: dict[str, Any] = json.loads(ended.stdout)
    assert check_log(users) == [] and finish_deletions(users, 5.0) == []
    kept, gone = {tuple(each) for each in said["kept"]}, {user for (user,) in said["gone"]}
    begun = {user for (user,) in said["begins"]}
    with closing(AdapterStore(users)) as store, closing(InteractionLog(users)) as log:
        assert store.manifest.damage() == log.database.damage() == []
        assert not [found for found in check(store) if not found.kind.startswith("orphan")]
        there = {(user, each.id) for user in log.users("") for each in log.interactions("", user)}
        assert not [pair for pair in kept - there if pair[0] not in begun]
        assert not {user for user, _ in there} & gone and not {user for user, _ in store.users()} & gone
    contents = {path: path.read_bytes() for path in users.iterdir() if path.is_file()}
    assert not [(user, path) for user in gone for path in contents if f"of {user} ".encode() in contents[path]]
    return said


def test_a_few_seconds(tmp_path: Path) -> None:
    said = stress(tmp_path, 3, 3, 0)
    assert said["kept"] and said["processes"] > 3


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(3))
def test_a_minute(tmp_path: Path, seed: int) -> None:
    said = stress(tmp_path, 60, 5, seed)
    assert len(said["kept"]) > 100 and said["gone"]
