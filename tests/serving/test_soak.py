"""`tests/soak` as a test: half a minute of mixed traffic and faults here, ten minutes with `-m slow`.

0 wrong, 0 lost; what the soak does and looks at is in `tests/soak/__main__.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOAK = Path(__file__).parents[1] / "soak"


def soak(run: Path, seconds: float, seed: int) -> dict[str, Any]:
    command = [sys.executable, str(SOAK), str(run), "--seconds", str(seconds), "--seed", str(seed)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 1500)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told: dict[str, Any] = json.loads(ended.stdout)
    return told


@pytest.mark.timeout(1600)
def test_half_a_minute(tiny_run: Path) -> None:
    told = soak(tiny_run, 20, 0)
    assert told["answers"] > 100 and told["acknowledged"] > 10


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_ten_minutes(tiny_run: Path) -> None:
    told = soak(tiny_run, 600, 1)
    assert told["server_starts"] > 3
