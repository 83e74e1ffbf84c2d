"""Losses from the labels' likelihoods against a forward pass of every true answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from proper.data.batching import collate
from proper.data.histories import TextExample
from proper.evaluation.runner import _losses_from, answer_losses, gate_items, mean_gates
from proper.inference.loading import load
from proper.inference.model import PersonalizedModel
from proper.inference.score import score
from proper.layers.batch_context import RowContext

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


class Histories:
    """What `mean_gates` needs of a data set: rows of different lengths."""

    def history(self, user: str, newest: int) -> list[TextExample]:
        texts = ["a few words", "more words " * 9, "one", "words " * 4]
        return [TextExample(at, user, text, "news", None, None, 9) for at, text in enumerate(texts)][:newest]


def with_tokens_at_once(model: PersonalizedModel, tokens: int) -> None:
    model.model.backbone.batch_tokens = tokens


def test_many_users_share_the_items_of_the_mean_gates() -> None:
    assert [gate_items(users) for users in (0, 1, 32, 80, 256, 100_000)] == [32, 32, 32, 12, 4, 4]


def test_mean_gates_in_chunks_are_those_of_a_whole_history(tiny_run: Path) -> None:
    model, dataset, users = load(tiny_run, "groups"), Histories(), ["u0", "u3"]
    whole = mean_gates(model, dataset, users)  # type: ignore[arg-type]
    expected = []
    for user in users:
        rows = [model.encoder.encode(example) for example in dataset.history(user, 32)]
        batch = collate(rows, model.model.backbone.pad_id)
        own = model.rows(batch.users)
        who = torch.zeros(len(rows), dtype=torch.long)
        context = RowContext(own.mode, own.embedding, users=who, mask=batch.attention_mask.bool())
        with torch.no_grad():
            model.model.answer_logits(batch, context)
        expected.append(model.model.routing.stacked()[:, 0])
    assert torch.equal(whole, torch.stack(expected)), "a history that fits is one batch"
    with_tokens_at_once(model, 1)
    torch.testing.assert_close(mean_gates(model, dataset, users), whole, atol=1e-3, rtol=0)  # type: ignore[arg-type]
    model.close()


def test_losses_do_not_depend_on_the_tokens_at_once(tiny_run: Path) -> None:
    model = load(tiny_run)
    rows = [row for user in ("u0", "u1") for row in Histories().history(user, 4)]
    whole = answer_losses(model, rows)
    with_tokens_at_once(model, 1)
    assert answer_losses(model, rows) == pytest.approx(whole, abs=0.02)
    model.close()
