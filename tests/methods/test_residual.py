"""Rows `groups+residual` and `users+residual` on a trained run: the formula, and that no query's answer is read."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proper import pipeline
from proper.config import Config
from proper.data.dataset import Dataset
from proper.inference.loading import load
from proper.inference.score import score
from proper.methods.prior import user_priors

NAMES = ["groups+residual", "users+residual"]


@pytest.fixture(scope="module")
def scored(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("residual") / "run"
    shutil.copytree(run, folder)
    pipeline.evaluate(folder, NAMES)
    return folder


@pytest.mark.parametrize("tier", ["groups", "users"])
def test_answers_add_the_habit_to_the_model(scored: Path, settings: Callable[..., Config], tier: str) -> None:
    (place,) = (path for path in (scored / "variants").iterdir() if path.name.startswith("residual-"))
    model = load(place, tier)
    with Dataset.open(scored / "data.sqlite") as dataset:
        priors, queries = user_priors(dataset, settings()), {query.id: query for query in dataset.queries()}
    lines = place / "predictions" / f"{tier}+residual.jsonl"
    lines = lines if lines.exists() else scored / "predictions" / f"{tier}+residual.jsonl"
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(queries)
    for row in rows:
        query = queries[row["id"]]
        own = score(model, [query.prompt], [query.user], dataset.labels)[0].tolist()
        both = [
            math.exp(s) * pi_u / pi
            for s, pi_u, pi in zip(own, priors.shares(query.user), priors.population, strict=True)
        ]
        assert row["prediction"] == dataset.labels[both.index(max(both))]
        share = both[dataset.labels.index(query.target)] / sum(both)
        assert row["label_loss"] == pytest.approx(-math.log(share), abs=1e-3) and row["loss"] is None
    model.close()


def test_stages_are_trained_otherwise_and_only_once(scored: Path) -> None:
    (place,) = (path for path in (scored / "variants").iterdir() if path.name.startswith("residual-"))
    ours, theirs = ((path / "groups" / "groups.safetensors").read_bytes() for path in (scored, place))
    assert ours != theirs
    losses = [json.loads(line)["loss"] for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert losses and all(math.isfinite(loss) and loss > 0 for loss in losses)
