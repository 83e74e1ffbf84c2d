"""Rows with the user prior on a trained run: the mixture's formula, and that nothing is taken from queries."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from proper import pipeline
from proper.config import Config
from proper.data.checks import require_no_leaks
from proper.data.dataset import Dataset
from proper.errors import ConfigError
from proper.inference.loading import load
from proper.inference.score import score
from proper.methods.prior import WEIGHTS, log_mixture, log_probabilities, user_priors
from proper.methods.table import known_methods
from tests.methods.conftest import answers

NAMES = ["users", "users+prior", "groups+prior"]


@pytest.fixture(scope="module")
def scored(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prior") / "run"
    shutil.copytree(run, folder)
    pipeline.evaluate(folder, NAMES)
    return folder


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    whole = sum(math.exp(one - top) for one in scores)
    return [math.exp(one - top) / whole for one in scores]


def slow_weight(run: Path, folder: Path, dataset: Dataset, config: Config, tier: str) -> float:
    """The w of the grid that answers most held-out items rightly under the model in `folder`, then the likeliest."""
    priors, model, rows = user_priors(dataset, config), load(folder, tier), []
    for user, held in priors.held.items():
        for row in dataset.history(user)[-held:] if held else []:
            own = softmax(score(model, [row.prompt], [user], dataset.labels)[0].tolist())
            rows.append((own, priors.shares_before(user), dataset.labels.index(row.target)))
    model.close()

    def quality(w: float) -> tuple[int, float]:
        mixed = [([w * p + (1 - w) * q for p, q in zip(own, habit, strict=True)], at) for own, habit, at in rows]
        right = sum(one.index(max(one)) == at for one, at in mixed)
        return right, sum(math.log(one[at]) for one, at in mixed)

    return max(map(float, WEIGHTS), key=quality)


def test_a_mixture_is_finite_where_a_probability_is_below_the_smallest_number() -> None:
    sure, even = log_probabilities([[0.0, -2000.0]]), log_probabilities([[3.0, 3.0]])
    assert log_mixture(sure, even, 1.0).tolist() == sure.tolist() == [[0.0, -2000.0]]
    assert log_mixture(sure, even, 0.0).tolist() == even.tolist()
    assert log_mixture(sure, even, 0.5).exp().tolist() == [pytest.approx([0.75, 0.25])]
    assert log_mixture(sure, torch.tensor([[-1.0, -1000.0]]).double(), 0.5)[0, 1] == pytest.approx(-1000 - math.log(2))


@pytest.mark.parametrize("tier", ["groups", "users"])
def test_the_mixture_is_the_formula(scored: Path, settings: Callable[..., Config], tier: str) -> None:
    config, model = settings(), load(scored, tier)
    (trial,) = (path for path in (scored / "variants").iterdir() if path.name.startswith("held-out-all-0.2-"))
    with Dataset.open(scored / "data.sqlite") as dataset:
        priors = user_priors(dataset, config)
        weight = slow_weight(scored, scored if tier == "groups" else trial, dataset, config, tier)
        queries = {query.id: query for query in dataset.queries()}
    for row in answers(scored, f"{tier}+prior"):
        query = queries[row["id"]]
        own = softmax(score(model, [query.prompt], [query.user], dataset.labels)[0].tolist())
        habit = priors.shares(query.user)
        mixed = [weight * p + (1 - weight) * q for p, q in zip(own, habit, strict=True)]
        assert row["prediction"] == dataset.labels[mixed.index(max(mixed))]
        assert row["label_loss"] == pytest.approx(-math.log(mixed[dataset.labels.index(query.target)]), abs=1e-3)
        assert row["loss"] is None
    model.close()


def test_the_trial_adapters_never_saw_a_held_out_item(scored: Path, settings: Callable[..., Config]) -> None:
    (path,) = (path for path in (scored / "variants" / "data").iterdir() if path.name.startswith("held-out-"))
    with Dataset.open(scored / "data.sqlite") as dataset, Dataset.open(path) as derived:
        priors = user_priors(dataset, settings())
        require_no_leaks(derived)
        asked = {row.id for row in dataset.queries()}
        for user in dataset.users("target"):
            history, held = [row.id for row in dataset.history(user.id)], priors.held[user.id]
            assert held > 0 and [row.id for row in derived.history(user.id)] == history[:-held]
            assert [row.id for row in derived.queries(user.id)] == history[-held:]
            facts = derived.user(user.id)
            assert facts is not None and (facts.history, facts.queries) == (len(history) - held, held)
        assert not asked & {row.id for row in derived.queries()}


def test_losses_over_labels_compare_rows_with_and_without_a_model(scored: Path) -> None:
    results = json.loads((scored / "results.json").read_text(encoding="utf-8"))
    assert {row["method"] for row in results["metrics"] if row["metric"] == "label_loss"} == {*NAMES, "prior"}
    assert {row["method"] for row in results["metrics"] if row["metric"] == "loss"} == {"users"}
    for row in answers(scored, "users"):
        # Only the file has the labels' scores.
        labels = sorted({one["target"] for one in answers(scored, "users")} | {row["target"]})
        assert len(row["label_scores"]) >= len(labels) and row["label_loss"] > 0


def test_the_queries_answers_are_not_read(scored: Path, settings: Callable[..., Config], tmp_path: Path) -> None:
    shutil.copy(scored / "data.sqlite", tmp_path / "data.sqlite")
    with sqlite3.connect(tmp_path / "data.sqlite") as connection:
        connection.execute("UPDATE texts SET target = 'red' WHERE id IN (SELECT text FROM rows WHERE part = 'query')")
    connection.close()
    with Dataset.open(scored / "data.sqlite") as one, Dataset.open(tmp_path / "data.sqlite") as other:
        before, after = user_priors(one, settings()), user_priors(other, settings())
        users = [user.id for user in one.users("target")]
    assert (before.decay, before.smoothing) == (after.decay, after.smoothing)
    assert all((before.shares(user) == after.shares(user)).all() for user in users)
    assert (before.population == after.population).all()


@pytest.mark.parametrize(
    ("task", "name", "says"),
    [
        ({"kind": "generation"}, "prior", "'prior' needs labels or ratings, and task.kind is generation"),
        ({"kind": "generation"}, "users+prior", r"users\+prior. needs labels or ratings"),
        ({"kind": "rating"}, "lead", "'lead' answers with words of the input, and task.kind is rating"),
    ],
)
def test_a_method_that_the_task_does_not_allow(
    settings: Callable[..., Config], task: dict[str, str], name: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        known_methods([name], settings(task=task))
