"""Predictions in the LaMP benchmark's format, accepted by its official scorer, and the scores that it would print.

The format is `{"task": "LaMP_3", "golds": [{"id", "output"}]}`. The scorer requires exactly the gold ids, so the golds
of the evaluated queries are written too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from proper.config import DataConfig
from proper.config.lamp_tasks import LAMP_TASKS
from proper.evaluation.metrics import TASK_METRICS, Prediction, TaskInfo, item_values, score
from proper.evaluation.rouge import rouge_official
from proper.files import write_json
from proper.run_folder import method_file

GOLDS, SCORES = "golds.lamp.json", "scores.lamp.json"
_OFFICIAL_NAMES = {
    **{"accuracy": "accuracy", "f1_macro": "f1", "mae": "MAE", "rmse": "RMSE"},
    **{"rouge1": "rouge-1", "rougeL": "rouge-L"},
}


def write_lamp_predictions(
    folder: Path, predictions: Mapping[str, Sequence[Prediction]], data: DataConfig, task: TaskInfo
) -> None:
    """Write each method's `METHOD.lamp.json`, the golds and the official scores into `folder`.

    Nothing is written if the data is not from LaMP.
    """
    if data.task is None:
        return
    name = LAMP_TASKS[data.task].output_name(data.format)
    scores = {}
    for method, found in predictions.items():
        ids = _ids(found)
        answers = [official_output(data.task, row.prediction) for row in found]
        _write(folder / f"{method_file(method)}.lamp.json", name, ids, answers)
        _write(folder / GOLDS, name, ids, [row.target for row in found])
        scores[method] = official_scores(found, task)
    write_json(folder / SCORES, {"task": name, "scores": scores})


def official_scores(predictions: Sequence[Prediction], task: TaskInfo) -> dict[str, float]:
    """Return the task's metrics under the official script's names; ROUGE with its bootstrap (seed 0)."""

    def value(metric: str) -> float:
        if task.kind == "generation":
            return rouge_official(item_values(metric, predictions, task), seed=0)
        return score(metric, predictions, task)

    return {_OFFICIAL_NAMES[metric]: value(metric) for metric in TASK_METRICS[task.kind]}


def _write(path: Path, task: str, ids: Sequence[str], texts: Sequence[str]) -> None:
    golds = [{"id": identity, "output": text} for identity, text in zip(ids, texts, strict=True)]
    write_json(path, {"task": task, "golds": golds})


def official_output(task: str, text: str) -> str:
    """Return an answer as the scorer expects it: "[1]" for LaMP-1, even if the bracket was part of the prompt."""
    text = text.strip()
    return f"[{text}" if task == "lamp-1" and text in ("1]", "2]") else text


def _ids(predictions: Sequence[Prediction]) -> list[str]:
    """Return the question ids of the files, prefixed with the user id if two users' questions share an id."""
    ids = [str(row.item) for row in predictions]
    return ids if len(set(ids)) == len(ids) else [f"{row.user}/{row.item}" for row in predictions]
