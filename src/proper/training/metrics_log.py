"""`metrics.jsonl`: the metrics of every training step of a run, one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from proper.files import make_folder, open_private

Log = Callable[[dict[str, Any]], None]
"""Function that takes the metrics of a step."""


class MetricsLog:
    """Append-only `metrics.jsonl` of a run, written during training.

    A line truncated by a kill is dropped when the file is opened again. Steps after the last checkpoint are logged
    again after a resume; readers take the later of two lines for one step.
    """

    def __init__(self, path: Path) -> None:
        make_folder(path.parent)
        self._file = os.fdopen(open_private(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "a+b")
        self._file.seek(0)
        whole = self._file.read().rfind(b"\n") + 1
        self._file.truncate(whole)

    def __call__(self, metrics: dict[str, Any]) -> None:
        """Write one line."""
        self._file.write(json.dumps(metrics).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def no_log(metrics: dict[str, Any]) -> None:
    """Log nothing; for processes other than the one that writes `metrics.jsonl`."""
