"""Losses from the labels' likelihoods against a forward pass of every true answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from proper.data.dataset import TextExample
from proper.evaluation.runner import _losses_from, answer_losses
from proper.inference.loading import load
from proper.inference.score import score

LABELS = ["news", "sport and games", "sport"]


def test_losses_come_out_of_the_scores(tiny_run: Path) -> None:
    model = load(tiny_run)
    asked = [("u0", "sport"), ("u3", "news"), ("nobody", "sport and games"), ("group", "no such label"), ("u1", "news")]
    queries = [
        TextExample(at, user, f"Text number {at} of a few:", target, item=None, time=None, tokens=12)
        for at, (user, target) in enumerate(asked)
    ]
    scores = score(model, [q.prompt for q in queries], [q.user for q in queries], LABELS)
    assert _losses_from(model, scores, queries, LABELS) == pytest.approx(answer_losses(model, queries), abs=1e-4)
    model.close()
