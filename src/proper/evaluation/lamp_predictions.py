"""Predictions in the format of the LaMP benchmark, so that its own scorer accepts them, and what that scorer would say.

`{"task": "LaMP_3", "golds": [{"id", "output"}]}`; the scorer wants exactly the gold ids, so the golds of just these
queries are written beside. Knows nothing about how answers came about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from proper.config import DataConfig
from proper.evaluation.metrics import TASK_METRICS, Prediction, TaskInfo, item_values, rouge_official, score
from proper.files import write_json
from proper.lamp_tasks import LAMP_TASKS

GOLDS, SCORES = "golds.lamp.json", "scores.lamp.json"
_OFFICIAL_NAMES = {
    **{"accuracy": "accuracy", "f1_macro": "f1", "mae": "MAE", "rmse": "RMSE"},
    **{"rouge1": "rouge-1", "rougeL": "rouge-L"},
}


def write_lamp_predictions(
    folder: Path, predictions: Mapping[str, Sequence[Prediction]], data: DataConfig, task: TaskInfo
) -> None:
    """Write each method's `METHOD.lamp.json`, the golds and the official scores into `folder`.

    Nothing is written where the data is not of LaMP.
    """
    if data.task is None:
        return
    name = LAMP_TASKS[data.task].output_name(data.format)
    scores = {}
    for method, found in predictions.items():
        ids = _ids(found)
        answers = [official_output(data.task, row.prediction) for row in found]
        _write(folder / f"{method}.lamp.json", name, ids, answers)
        _write(folder / GOLDS, name, ids, [row.target for row in found])
        scores[method] = official_scores(found, task)
    write_json(folder / SCORES, {"task": name, "scores": scores})


def official_scores(predictions: Sequence[Prediction], task: TaskInfo) -> dict[str, float]:
    """Return the task's metrics by the names and, for ROUGE, with the bootstrap of the official script (seed 0)."""

    def value(metric: str) -> float:
        if task.kind == "generation":
            return rouge_official(item_values(metric, predictions, task), seed=0)
        return score(metric, predictions, task)

    return {_OFFICIAL_NAMES[metric]: value(metric) for metric in TASK_METRICS[task.kind]}


def _write(path: Path, task: str, ids: Sequence[str], texts: Sequence[str]) -> None:
    golds = [{"id": identity, "output": text} for identity, text in zip(ids, texts, strict=True)]
    write_json(path, {"task": task, "golds": golds})


def official_output(task: str, text: str) -> str:
    """Return an answer as the scorer reads it: LaMP-1's is "[1]", also where the prompt had its bracket already."""
    text = text.strip()
    return f"[{text}" if task == "lamp-1" and text in ("1]", "2]") else text


def _ids(predictions: Sequence[Prediction]) -> list[str]:
    """Return the questions' ids in the files, with the user in front where two users' questions share one."""
    ids = [str(row.item) for row in predictions]
    return ids if len(set(ids)) == len(ids) else [f"{row.user}/{row.item}" for row in predictions]
