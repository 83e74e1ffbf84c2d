"""Logits and losses of answers: only what the loss counts is computed, and it is the sum over answer tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from proper.data.batching import collate
from proper.models.answer_loss import answer_logits, answer_loss
from proper.models.personal import ProperModel
from tests.models.mixed_rows import mixed, rows_of

Build = Callable[..., ProperModel]


def test_only_the_answers_logits_are_computed(personal: Build) -> None:
    model = personal()
    batch, rows = collate(rows_of(), pad=0), mixed(model)
    with torch.no_grad(), model.routing.use(rows):
        some = answer_logits(model.backbone.model, batch)
        every = model.backbone.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
        ).logits
    assert some.shape == (5, 5, 8192)
    assert float((some - every[:, -6:-1]).abs().max()) < 1e-5


def test_answer_loss_is_the_sum_over_answer_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 11, generator=generator)
    labels = torch.tensor([[-100, 3, 5, 1], [0, 0, 10, 2], [-100, -100, -100, 7]])
    expected = []
    for row in range(3):
        loss = 0.0
        for t in range(4):
            if labels[row, t] >= 0:
                powers = logits[row, t].double().exp()
                loss -= float((powers[labels[row, t]] / powers.sum()).log())
        expected.append(loss)

    total, tokens = answer_loss(logits, labels)

    assert total.tolist() == pytest.approx(expected, rel=1e-5)
    assert tokens.tolist() == [3, 4, 1]
    low, _ = answer_loss(logits.bfloat16(), labels)
    assert low.dtype == torch.float32
    assert torch.equal(low, answer_loss(logits.bfloat16().float(), labels)[0]), "the softmax is fp32"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answer_losses_are_those_of_the_logits(personal: Build, dtype: torch.dtype) -> None:
    """The head runs on the tokens that count; other conversations' turns in between do not."""
    model = personal(dtype)
    encoded = [replace(row, between=(row.start + 1,)) if at == 2 else row for at, row in enumerate(rows_of())]
    batch, seen = collate(encoded, pad=0), []
    head = model.backbone.model.get_output_embeddings()
    head.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape[:2])))
    parameters = model.group_parameters()

    def gradients(losses: Tensor) -> list[Tensor]:
        for parameter in parameters.values():
            parameter.requires_grad_().grad = None
        losses.sum().backward()  # type: ignore[no-untyped-call]
        return [p.grad for p in parameters.values() if p.grad is not None]

    losses, counts = model.answer_losses(batch, mixed(model))
    assert losses.dtype == torch.float32 and counts.tolist() == [3, 1, 4, 2, 4]
    found = gradients(losses)
    expected, numbers = answer_loss(model.answer_logits(batch, mixed(model)), batch.labels)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(losses, expected, **close)
    for one, other in zip(found, gradients(expected), strict=True):
        torch.testing.assert_close(one, other, **close)
    assert torch.equal(counts, numbers) and seen == [(1, 14), (5, 5)]
    weights = [1.0, 0.5, 2.0, 0.25, 1.0]
    weighed = [replace(row, weight=weight) for row, weight in zip(encoded, weights, strict=True)]
    again, same = model.answer_losses(collate(weighed, pad=0), mixed(model))
    torch.testing.assert_close(again, losses * torch.tensor(weights))
    assert torch.equal(same, counts)
