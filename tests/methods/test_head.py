"""The linear head with the user prior: against scikit-learn, and what its training rows may know."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from proper import pipeline
from proper.config import Config
from proper.data.dataset import Dataset
from proper.data.prior import label_numbers, user_prior
from proper.inference.loading import load
from proper.methods.head import HeadData, HeadRows, LinearHead, head_with_prior, pooled_states, training_rows
from proper.methods.prior import user_priors
from proper.methods.spec import TrainedRun


@pytest.fixture(scope="module")
def place(run: Path, settings: Callable[..., Config]) -> TrainedRun:
    return TrainedRun(settings(), Dataset.open(run / "data.sqlite"), run, 0)


@pytest.mark.parametrize("penalty", [1.0, 0.01])
def test_without_habits_it_is_the_logistic_regression_of_scikit_learn(penalty: float) -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 60)
    features = draw.normal(size=(60, 5)) + np.eye(3, 5)[labels]
    rows = HeadRows(torch.from_numpy(features).float(), torch.zeros(60, 3), torch.from_numpy(labels))
    head = LinearHead(rows)
    head.fit(rows, penalty)
    scaled = (features - features.mean(0)) / features.std(0)
    theirs = LogisticRegression(C=1 / (penalty * 60), tol=1e-8, max_iter=1000).fit(scaled, labels)
    assert head.scores(rows).softmax(1).numpy() == pytest.approx(theirs.predict_proba(scaled), abs=2e-3)


def test_habits_that_say_everything_get_a_weight() -> None:
    labels = torch.arange(40) % 2
    habit = torch.log(torch.tensor([[0.8, 0.2], [0.2, 0.8]]))[labels]
    rows = HeadRows(torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), habit, labels)
    head = LinearHead(rows)
    head.fit(rows, 1.0)
    assert float(head.habit) > 1.5 and (head.scores(rows).argmax(1) == labels).all()


def test_a_rows_habit_is_of_the_items_before_it(place: TrainedRun) -> None:
    dataset, priors = place.dataset, user_priors(place.dataset, place.config)
    number = label_numbers(dataset.labels, "classification")
    rows = training_rows(place)
    assert len({row.id for row in rows}) == len(rows)
    assert {row.user for row in rows} == {user.id for user in dataset.users()}
    for hold_out in (False, True):
        found, held = HeadData(rows, torch.zeros(len(rows), 1), dataset, priors, number).habits(hold_out=hold_out)
        population = priors.population_before if hold_out else priors.population
        assert len(held) == (sum(priors.held.values()) if hold_out else 0)
        for row in rows:
            items = [other for other in dataset.history(row.user) if other.id < row.id and other.id not in held]
            before = [number(other.target) for other in items]
            own = user_prior(np.asarray(before, dtype=np.int64), population, priors.decay, priors.smoothing)
            assert np.exp(found[row.id]) == pytest.approx(own, abs=1e-9)


def test_features_are_the_prompts_own_states(place: TrainedRun) -> None:
    model, texts = load(place.folder, "population"), ["red small is", "blue old new quiet loud is"]
    together = pooled_states(model, texts, place.dataset.labels, "")
    alone = torch.cat([pooled_states(model, [text], place.dataset.labels, "") for text in texts])
    ids = torch.tensor([model.encoder.prompt(texts[0])])
    with torch.no_grad():
        states = model.model.backbone.model(ids, output_hidden_states=True).hidden_states[-1][0]
    model.close()
    assert torch.allclose(together, alone, atol=1e-4)
    assert torch.allclose(together[0], torch.cat([states.mean(0), states[-1]]), atol=1e-4)


def test_it_answers_every_query_and_reads_no_querys_answer(
    place: TrainedRun, settings: Callable[..., Config], tmp_path: Path
) -> None:
    before = head_with_prior(place).predictions
    assert len(before) == sum(1 for _ in place.dataset.queries())
    assert all(row.prediction in place.dataset.labels and row.label_loss for row in before)
    shutil.copy(place.folder / "data.sqlite", tmp_path / "data.sqlite")
    with sqlite3.connect(tmp_path / "data.sqlite") as connection:
        connection.execute("UPDATE texts SET target = 'red' WHERE id IN (SELECT text FROM rows WHERE part = 'query')")
    connection.close()
    with Dataset.open(tmp_path / "data.sqlite") as changed:
        after = head_with_prior(TrainedRun(settings(), changed, place.folder, 0)).predictions
    assert [row.prediction for row in after] == [row.prediction for row in before]


def test_it_learns_what_texts_say_of_ratings(settings: Callable[..., Config], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = []
    for user in ("ann", "bob", "eve"):
        for at in range(25):
            word, stars = (("awful", "1"), ("fine", "3"), ("superb", "5"))[(at + ord(user[0])) % 3]
            lines.append({"user_id": user, "timestamp": at, "input": f"{word} film {at}", "output": stars})
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = settings(
        data={"path": str(rows)}, task={"kind": "rating"}, evaluation={"methods": ["population", "head+prior"]}
    )
    out = pipeline.run(config, tmp_path / "run", stages=["population", "evaluate"])
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    mae = {row["method"]: row["value"] for row in results["metrics"] if row["metric"] == "mae"}
    assert mae["head+prior"] < 0.5 * min(mae["prior"], mae["user-majority"])


def test_with_a_stage_it_answers_with_the_mean_of_both(
    run: Path, settings: Callable[..., Config], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    result = pipeline.evaluate(folder, ["groups", "users", "head+prior", "groups+head", "users+head"])
    with Dataset.open(folder / "data.sqlite") as dataset:
        labels = dataset.labels

    def answers(method: str) -> dict[int, dict[str, Any]]:
        lines = (folder / "predictions" / f"{method}.jsonl").read_text(encoding="utf-8").splitlines()
        return {row["id"]: row for row in map(json.loads, lines)}

    head = answers("head+prior")
    for stage in ("groups", "users"):
        own, mixed = answers(stage), answers(f"{stage}+head")
        assert mixed.keys() == own.keys() == head.keys()
        for key, row in mixed.items():
            shares = [np.exp(np.array(one["label_scores"])) for one in (own[key], head[key])]
            mean = sum(share / share.sum() for share in shares) / 2
            assert row["prediction"] == labels[int(np.argmax(mean))]
            assert row["label_loss"] == pytest.approx(-np.log(mean[labels.index(row["target"])]), abs=2e-3)
            assert row["loss"] is None
    tested = {(row["method"], row["against"]) for row in result["comparisons"]}
    assert {("users+head", "head+prior"), ("users+head", "users"), ("users+head", "groups+head")} <= tested
