"""Predictions in the format of the LaMP benchmark, so that its own scorer accepts them.

`{"task": "LaMP_3", "golds": [{"id", "output"}]}`; the scorer wants exactly the gold ids, so the golds of just these
queries are written beside. Knows nothing about how answers came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from proper.config import DataConfig
from proper.evaluation.metrics import Prediction
from proper.files import write_json
from proper.lamp_tasks import LAMP_TASKS

GOLDS = "golds.lamp.json"


def write_lamp_predictions(folder: Path, method: str, predictions: Sequence[Prediction], data: DataConfig) -> None:
    """Write `METHOD.lamp.json` and `golds.lamp.json` into `folder`; nothing where the data is not of LaMP."""
    if data.task is None:
        return
    task = LAMP_TASKS[data.task].output_name(data.format)
    ids = _ids(predictions)
    answers = [official_output(data.task, row.prediction) for row in predictions]
    for name, texts in ((f"{method}.lamp.json", answers), (GOLDS, [row.target for row in predictions])):
        golds = [{"id": identity, "output": text} for identity, text in zip(ids, texts, strict=True)]
        write_json(folder / name, {"task": task, "golds": golds})


def official_output(task: str, text: str) -> str:
    """Return an answer as the scorer reads it: LaMP-1's is "[1]", also where the prompt had its bracket already."""
    text = text.strip()
    return f"[{text}" if task == "lamp-1" and text in ("1]", "2]") else text


def _ids(predictions: Sequence[Prediction]) -> list[str]:
    """Return the questions' ids in the files, with the user in front where two users' questions share one."""
    ids = [str(row.item) for row in predictions]
    return ids if len(set(ids)) == len(ids) else [f"{row.user}/{row.item}" for row in predictions]
