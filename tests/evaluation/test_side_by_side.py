"""Two runs compared: pairs by user and query, which seeds, what is missing, and what is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proper.config import make_config
from proper.data.dataset import prepare
from proper.errors import DataError, RunFolderError
from proper.evaluation.metrics import Prediction, TaskInfo
from proper.evaluation.results import RawResults, build_results
from proper.evaluation.runner import write_predictions
from proper.evaluation.side_by_side import compare_runs
from proper.evaluation.statistics import Effort, compare, holm, user_scores

TASK = TaskInfo("notes", "classification", ("a", "b"))
EFFORT = Effort(200, 500)


def invent(right: float, seed: int, users: int = 12) -> list[Prediction]:
    noise = random.Random(f"{right} {seed}")
    rows = []
    for id_ in range(4 * users):
        target = "ab"[id_ * 7 % 3 % 2]
        said = target if noise.random() < right else "ab"[target == "a"]
        rows.append(
            Prediction(
                id=id_,
                user=f"u{id_ % users}",
                prompt="",
                target=target,
                prediction=said,
                loss=2 - right,
                label_loss=0.1 if said == target else 2.5,
            )
        )
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A prepared data set whose labels are those of the task."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"user_id": f"u{n % 3}", "timestamp": n, "input": f"text {n}", "output": "ab"[n % 2]} for n in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"kind": "classification"}
    config = make_config({"data": {"path": str(folder / "rows.jsonl")}, "task": task, "split": {"min_history": 3}})
    prepare(config, folder / "data.sqlite", lambda prompts, targets: [1] * len(prompts)).close()
    return (folder / "data.sqlite").read_bytes()


@pytest.fixture
def make(tmp_path: Path, data: bytes) -> Callable[..., Path]:
    """Write a run folder: how often each method is right, for which seeds and users."""

    def build(name: str, right: dict[str, float], seeds: tuple[int, ...] = (0, 1), users: int = 12, **run: Any) -> Path:
        folder = tmp_path / name
        predictions = {seed: {m: invent(share, seed, users) for m, share in right.items()} for seed in seeds}
        for seed, methods in predictions.items():
            place = folder if seed == seeds[0] else folder / "seeds" / str(seed)
            for method, rows in methods.items():
                write_predictions(place / "predictions" / f"{method}.jsonl", rows)
        facts = {"backbone": "tiny", "data_sha256": "1", **run}
        results = build_results(RawResults(predictions=predictions, task=TASK, run=facts, seconds={}), EFFORT)
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "data.sqlite").write_bytes(data)
        return folder

    return build


def test_differences_are_those_of_the_paired_comparison(make: Callable[..., Path]) -> None:
    one = make("one", {"base": 0.2, "groups": 0.9, "users": 0.95})
    other = make("other", {"groups": 0.5, "users": 0.9, "oppu": 0.1})
    found = compare_runs(one, other, EFFORT)
    assert found["seeds"] == [[0, 0], [1, 1]] and found["missing"] == {}
    rows = {(row["method"], row["metric"]): row for row in found["rows"]}
    assert {method for method, _ in rows} == {"groups", "users"}
    assert {metric for _, metric in rows} == {"accuracy", "f1_macro", "loss", "label_loss"}
    for (method, metric), row in rows.items():
        ours, theirs = (
            user_scores(metric, [invent(share, seed) for seed in (0, 1)], TASK)
            for share in {"groups": (0.9, 0.5), "users": (0.95, 0.9)}[method]
        )
        expected = compare(ours, theirs, EFFORT)
        assert (row["difference"], row["p_value"]) == (expected.difference, expected.p_value)
        assert row["ci95"] == [expected.low, expected.high] and (row["users"], row["queries"]) == (12, 48)
        assert row["paired_first"] == pytest.approx(row["first"]["value"])
        assert row["paired_first"] - row["paired_second"] == pytest.approx(row["difference"])
    main = [row for row in found["rows"] if row["primary"]]
    assert [row["p_adjusted"] for row in main] == holm([row["p_value"] for row in main])
    assert compare_runs(one, one, EFFORT)["rows"][0]["difference"] == 0


def test_only_users_and_seeds_of_both_are_paired(make: Callable[..., Path]) -> None:
    one, other = make("one", {"users": 0.9}, seeds=(0, 1, 2)), make("other", {"users": 0.5}, seeds=(2, 5))
    predictions = other / "predictions" / "users.jsonl"
    lines = predictions.read_text().splitlines(keepends=True)
    predictions.write_text("".join(line for line in lines if '"u3"' not in line))
    found = compare_runs(one, other, EFFORT)
    assert found["seeds"] == [[2, 2]]
    assert (found["rows"][0]["users"], found["rows"][0]["queries"]) == (11, 44)
    nothing_shared = make("third", {"users": 0.5}, seeds=(7,))
    assert compare_runs(one, nothing_shared, EFFORT)["seeds"] == [[0, 7]]


def test_what_cannot_be_paired_says_why_and_keeps_its_values(make: Callable[..., Path]) -> None:
    one, other = (make(name, {"users": 0.9, "groups": 0.7, "base": 0.2}) for name in ("one", "other"))
    (other / "seeds" / "1" / "predictions" / "users.jsonl").unlink()
    for folder in (one, other):  # what needs no training is answered once
        (folder / "seeds" / "1" / "predictions" / "base.jsonl").unlink()
    found = compare_runs(one, other, EFFORT)
    assert found["missing"] == {"users": "other keeps no predictions of seed 1"}
    row = next(row for row in found["rows"] if row["method"] == "users")
    assert row["difference"] is None and row["first"]["value"] == row["second"]["value"] > 0.5
    (one / "data.sqlite").unlink()
    assert set(compare_runs(one, other, EFFORT)["missing"].values()) == {"its prepared data is missing"}


@pytest.mark.parametrize(
    ("section", "change", "says"),
    [
        ("task", {"name": "films"}, "different tasks: name 'notes' and 'films'"),
        ("task", {"kind": "rating"}, "different tasks: kind 'classification' and 'rating'"),
        ("run", {"data_sha256": "2"}, "different data: sha256 1 and 2; rows, templates, task and split"),
    ],
)
def test_other_tasks_and_data_are_refused(
    make: Callable[..., Path], section: str, change: dict[str, str], says: str
) -> None:
    one, other = make("one", {"users": 0.9}), make("other", {"users": 0.9})
    results = json.loads((other / "results.json").read_text())
    results[section] |= change
    (other / "results.json").write_text(json.dumps(results))
    with pytest.raises(DataError, match=says):
        compare_runs(one, other, EFFORT)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda results: results["run"].pop("seeds"), r"run\.seeds: Field required"),
        (lambda results: results["run"].update(seeds=[]), r"run\.seeds: List should have at least 1 item"),
        (lambda results: results["task"].update(kind=None), r"task\.kind: "),
        (lambda results: results["metrics"][1].pop("ci95"), r"metrics\.1\.ci95: Field required"),
        (lambda results: results.update(metrics=[3]), r"metrics\.0: "),
    ],
)
def test_damaged_results_are_named(make: Callable[..., Path], damage: Callable[[Any], object], says: str) -> None:
    one, other = make("one", {"users": 0.9}), make("other", {"users": 0.9})
    path = other / "results.json"
    results = json.loads(path.read_text())
    damage(results)
    path.write_text(json.dumps(results))
    with pytest.raises(RunFolderError, match=rf"other/results\.json: {says}.*; remove it, and 'proper evaluate'"):
        compare_runs(one, other, EFFORT)


def test_a_run_without_results_is_named(make: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="nowhere/results.json: no such file"):
        compare_runs(make("one", {"users": 0.9}), tmp_path / "nowhere")
