"""The errors that remain: variance, shared errors and labels of similar items, on answers made by hand."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from experiments import errors
from proper import pipeline
from proper.config import make_config
from proper.data.dataset import Dataset
from proper.evaluation.metrics import Prediction
from proper.evaluation.runner import write_predictions


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, backbone_folder: Path) -> Path:
    """A run with stage 1 of two users with pairs of similar items: ann labels both the same, bob differently."""
    folder = tmp_path_factory.mktemp("errors")
    rows = folder / "rows.jsonl"
    words = ["stone", "river", "cloud", "apple", "chair", "horse", "green", "music"]
    with rows.open("w", encoding="utf-8") as file:
        for user in ("ann", "bob"):
            for at in range(16):
                label = ("x", "y")[(at // 2) % 2 if user == "ann" else at % 2]
                text = f"{words[at // 2]} {words[at // 2][::-1]} number{at}"
                file.write(json.dumps({"user_id": user, "timestamp": at, "input": text, "output": label}) + "\n")
    raw = {
        "data": {"path": str(rows), "prompt": "{input}"},
        "task": {"kind": "classification"},
        "backbone": str(backbone_folder),
        "compute": {"dtype": "fp32", "max_length": 64, "device": "cpu"},
        "split": {"min_history": 3, "queries": 0.25},
        "population": {"epochs": 1, "max_tokens": 50},
    }
    return pipeline.run(make_config(raw), folder / "run", stages=["population"])


def answer(folder: Path, method: str, right: list[float]) -> None:
    """Write predictions with these probabilities of the true label, of two."""
    path = folder / "predictions" / f"{method}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with Dataset.open(folder / "data.sqlite") as dataset:
        labels, queries = dataset.labels, sorted(dataset.queries(), key=lambda row: (row.user, row.prompt))
    rows = []
    for query, share in zip(queries, right, strict=True):
        other = next(label for label in labels if label != query.target)
        scores = [math.log(share if label == query.target else 1 - share) for label in labels]
        said = query.target if share > 0.5 else other
        rows.append(
            Prediction(
                id=query.id,
                user=query.user,
                prompt=query.prompt,
                target=query.target,
                prediction=said,
                label_scores=scores,
            )
        )
    write_predictions(path, rows)


def test_errors_are_counted_by_what_all_runs_share(run: Path, tmp_path: Path) -> None:
    first, second = (Path(shutil.copytree(run, tmp_path / name)) for name in ("first", "second"))
    answer(first, "users", [0.9, 0.9, 0.4, 0.4, 0.1, 0.1, 0.9, 0.9])
    answer(second, "users", [0.9, 0.9, 0.9, 0.4, 0.1, 0.1, 0.9, 0.4])
    answer(first, "head+prior", [0.9] * 5 + [0.1] * 3)
    answer(second, "head+prior", [0.9] * 5 + [0.1] * 3)
    errors.main([str(first), str(second), "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    users, head = found["methods"]["users"], found["methods"]["head+prior"]
    assert users["by_run"] == [0.5, 0.5] and users["accuracy"][0] == 0.5
    # The mean of .4 and .9 is right, that of .9 and .4 too.
    assert users["mean_of_runs"][0] == 5 / 8 and users["difference"][0] == pytest.approx(1 / 8)
    assert head["by_run"] == [5 / 8, 5 / 8] and head["difference"][0] == 0
    assert (found["queries"], found["wrong_in_all"], found["of_these_second"]) == (8, 1, 1)
    assert len(found["most_frequent"]) == 1 and found["most_frequent"][0][2] == 1


def test_labels_of_similar_items_differ_where_they_alternate(run: Path) -> None:
    found = errors.similar_items(run)
    near = [row for row in found if row["cosine"][0] >= 0.3]
    with Dataset.open(run / "data.sqlite") as dataset:
        sizes = [user.history for user in dataset.users("target")]
    # Only the pairs of the same text are near; half of them are bob's, whose labels alternate.
    assert sum(row["pairs"] for row in near) == sum(size // 2 for size in sizes)
    assert sum(row["different"] for row in near) == sizes[1] // 2


def test_runs_of_other_queries_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (Path(shutil.copytree(run, tmp_path / name)) for name in ("first", "second"))
    with pytest.raises(ValueError, match="no method in common"):
        errors.read([first, second])
    for folder in (first, second):
        answer(folder, "users", [0.9] * 8)
    path = second / "predictions" / "users.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[1:]), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        errors.main([str(first), str(second), "--out", str(tmp_path / "found.json")])
    said = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and said.endswith("error: the runs have different queries")
    assert not (tmp_path / "found.json").exists()
