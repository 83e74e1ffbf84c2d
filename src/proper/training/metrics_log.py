"""Training metrics of a run as JSON Lines, appended during training.

A line truncated by a kill is dropped when the file is opened again. Steps after the last checkpoint are logged again
after a resume; readers take the later of two lines for one step.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from proper.files import make_folder, open_private


class MetricsLog:
    """Append-only `metrics.jsonl`."""

    def __init__(self, path: Path) -> None:
        make_folder(path.parent)
        self._file = os.fdopen(open_private(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "a+b")
        self._file.seek(0)
        whole = self._file.read().rfind(b"\n") + 1
        self._file.truncate(whole)

    def __call__(self, facts: dict[str, Any]) -> None:
        """Write one line."""
        self._file.write(json.dumps(facts).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
