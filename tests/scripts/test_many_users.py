"""The script that fits thousands of users: what it prepares, and what it says of a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from proper.config import load_config
from scripts import many_users

ROOT = Path(__file__).parents[2]


def test_everybody_is_a_target_with_5_to_12_items_and_a_second_call_changes_nothing(tmp_path: Path) -> None:
    path = many_users.prepare(tmp_path, 6)
    config = load_config(path)
    assert config.split.target_users == 6 and config.split.min_history == 5
    rows = Path(config.data.path).read_text(encoding="utf-8").splitlines()
    assert 6 * 7 <= len(rows) <= 6 * 15
    stamp = path.stat().st_mtime_ns
    assert many_users.prepare(tmp_path, 6) == path and path.stat().st_mtime_ns == stamp


def test_a_process_is_looked_at_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_users, "SECONDS_BETWEEN", 0.2)
    seconds, peak, held = many_users.timed(["--help"])
    assert seconds > 0 and peak > 2**22
    assert all(0 <= size <= peak for size in held)
    with pytest.raises(SystemExit, match="proper nothing: failed"):
        many_users.timed(["nothing"])
