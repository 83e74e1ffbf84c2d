"""`tests/soak` as a test: some seconds and ten minutes of mixed traffic and faults.

`tests/soak/__main__.py` describes the traffic, the faults and the conditions.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOAK = Path(__file__).parents[1] / "soak"


def soak(run: Path, seconds: float, seed: int, *more: str) -> dict[str, Any]:
    options = ["--seconds", str(seconds), "--seed", str(seed), *more]
    command = [sys.executable, str(SOAK), str(run), *options]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 1500)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told: dict[str, Any] = json.loads(ended.stdout)
    return told


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_some_seconds(tiny_run: Path) -> None:
    told = soak(tiny_run, 12, 0, "--askers", "2")
    assert told["answers"] > 50 and told["acknowledged"] > 5


@pytest.mark.slow
def test_a_run_with_labels_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("task: {labels: ['yes', 'no']}\n", encoding="utf-8")
    ended = subprocess.run([sys.executable, str(SOAK), str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and not ended.stdout
    line = f"soak: {tmp_path}: the run has task.labels and cannot answer with a code word"
    assert ended.stderr.splitlines()[-1] == line and "Traceback" not in ended.stderr


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_ten_minutes(tiny_run: Path) -> None:
    told = soak(tiny_run, 600, 1)
    assert told["server_starts"] > 3
