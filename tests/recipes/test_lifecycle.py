"""The lifecycle recipe: the rows of new users, and the whole life as a reader would run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_new_users_have_interactions_before_and_after_they_change(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "recipes" / "lifecycle.py"), "rows", str(tmp_path), "8"]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert said == "8 new users: {'abrupt': 2, 'back': 2, 'slow': 2, 'stable': 2}\n"
    for part in ("arrive", "later"):
        files = sorted((tmp_path / part).iterdir())
        assert [path.name for path in files] == [f"new{number:02d}.jsonl" for number in range(1, 9)]
        for path in files:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            assert len(rows) == 8 and all(row.keys() == {"prompt", "target"} for row in rows)


@pytest.mark.slow
def test_fifty_users_live(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OUT": str(tmp_path / "life")}
    script = str(ROOT / "recipes" / "lifecycle.sh")
    ended = subprocess.run(
        ["bash", script], env=environment, capture_output=True, text=True, timeout=3000, cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    certificate = json.loads((tmp_path / "life" / "certificate.json").read_text(encoding="utf-8"))
    assert certificate and "69 users" in ended.stdout.splitlines()[-1]
