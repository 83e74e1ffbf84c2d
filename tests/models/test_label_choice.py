"""The loss of a choice among labels in one pass over a tree, against one pass per prompt and label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proper.data.batching import collate
from proper.data.encoder import EncodedExample
from proper.data.label_tree import LabelChoice, LabelTree
from proper.layers.batch_context import RowContext
from proper.models.personal import ProperModel

Labels = list[tuple[int, ...]]
ENDS = st.lists(st.integers(3, 6), min_size=0, max_size=3).map(lambda ids: (*ids, 2))
LABELS = st.lists(ENDS, min_size=1, max_size=5, unique=True)
ROWS = st.lists(st.tuples(st.integers(1, 9), LABELS, st.integers(0, 4)), min_size=1, max_size=3)


def chosen(prompt: Sequence[int], labels: Labels, answer: int, prior: Tensor) -> EncodedExample:
    tree = LabelTree.of(labels)
    ids = (*prompt, *tree.tokens.tolist())
    return EncodedExample("u", ids, len(prompt), choice=LabelChoice(tree, prior, answer))


def slow(model: ProperModel, row: EncodedExample, labels: Labels, rows: RowContext) -> Tensor:
    """The formula: every label's likelihood from a pass of its own."""
    assert row.choice is not None
    scores = []
    for label in labels:
        whole = EncodedExample("u", (*row.ids[: row.start], *label), row.start)
        scores.append(-model.answer_losses(collate([whole], pad=0), rows)[0][0])
    return -(torch.stack(scores) + row.choice.prior).log_softmax(0)[row.choice.answer]


def context(mode: str, rows: int, only: int | None = None) -> RowContext:
    draw = torch.Generator().manual_seed(3)
    embedding, slots = 0.5 * torch.randn(rows, 16, generator=draw), torch.arange(rows) % 3
    kept = slice(None) if only is None else slice(only, only + 1)
    return RowContext(mode, embedding=embedding[kept], slots=slots[kept])  # type: ignore[arg-type]


@given(given_rows=ROWS, mode=st.sampled_from(["groups", "fit", "users"]), seed=st.integers(0, 9))
@settings(max_examples=8)
def test_the_loss_and_its_gradient_are_those_of_a_pass_per_label(
    given_rows: list[tuple[int, Labels, int]], mode: str, seed: int, personal: Callable[..., ProperModel]
) -> None:
    model, draw = personal(), torch.Generator().manual_seed(seed)
    rows, labels = [], [each for _, each, _ in given_rows]
    for length, own, answer in given_rows:
        prompt = torch.randint(3, 8000, (length,), generator=draw).tolist()
        rows.append(chosen(prompt, own, answer % len(own), torch.randn(len(own), generator=draw)))
    bank, groups = next(iter(model.layers.values())).bank, [*model.group_parameters().values()]
    assert bank is not None and bank.gradients is not None

    def gradients(losses: Tensor) -> list[Tensor]:
        assert bank is not None and bank.gradients is not None
        bank.gradients.zero_()
        found = torch.autograd.grad(losses.sum(), groups)
        return [*found, bank.gradients.clone()]

    losses, counts = model.answer_losses(collate(rows, pad=0), context(mode, len(rows)))
    expected = torch.stack([slow(model, row, labels[at], context(mode, len(rows), at)) for at, row in enumerate(rows)])
    assert counts.tolist() == [1.0] * len(rows) and all(row.answers == 1 for row in rows)
    assert torch.allclose(losses, expected, atol=2e-4)
    for mine, theirs in zip(gradients(losses), gradients(expected), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-3 * float(theirs.abs().max()) + 1e-5)


@pytest.mark.parametrize("labels", [[(5,), (6,), (7,)], [(5, 2)]], ids=["one token each", "one label"])
def test_labels_without_branches(labels: Labels, personal: Callable[..., ProperModel]) -> None:
    model, rows = personal(), context("users", 1)
    row = chosen([9, 8, 7], labels, 0, torch.zeros(len(labels)))
    found = model.answer_losses(collate([row], pad=0), rows)[0].detach()
    assert float(found[0]) == pytest.approx(float(slow(model, row, labels, rows).detach()), abs=1e-4)


def test_cached_lower_layers_are_left_alone(personal: Callable[..., ProperModel], tmp_path: Path) -> None:
    """The cache holds states of plain texts: behind a prompt, the tokens of a tree have other positions."""
    model, rows = personal(layers=1), context("groups", 1)
    row = chosen([9, 8, 7, 6], [(5, 4, 2), (5, 3, 2)], 1, torch.zeros(2))
    before = float(model.answer_losses(collate([row], pad=0), rows)[0].detach()[0])
    with model.caching(tmp_path, 8):
        again = [float(model.answer_losses(collate([row], pad=0), rows)[0].detach()[0]) for _ in range(2)]
    assert again == [before, before]
