"""Gradient checkpointing changes no gradient, and leaves a model as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from proper.data.batching import collate
from proper.layers.batch_context import RowContext
from proper.layers.routing_losses import constraint_loss
from proper.models.answer_loss import answer_loss
from proper.models.gradient_checkpointing import gradient_checkpointing
from proper.models.personal import ProperModel
from tests.models.mixed_rows import embeddings, rows_of

Build = Callable[..., ProperModel]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["none", "users"])
def test_gradient_checkpointing_changes_no_gradient(personal: Build, dropout: float, kind: str) -> None:
    def gradients(on: bool) -> dict[str, Tensor]:
        model = personal(dropout=dropout)
        parameters = model.group_parameters()
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        model.train(True)
        torch.manual_seed(4)
        batch, own = collate(rows_of(), pad=0), embeddings(model).requires_grad_()
        users = torch.tensor([0, 1, 2, 1, 0])
        training = {name for name, module in model.backbone.model.named_modules() if module.training}
        with gradient_checkpointing(model.backbone.model, on):
            logits = model.answer_logits(
                batch, RowContext("groups", embedding=own, users=users, mask=batch.attention_mask.bool())
            )
            loss = answer_loss(logits, batch.labels)[0].sum()
            if kind == "users":
                loss = loss + 10 * constraint_loss("users", model.routing.stacked())
            loss.backward()
        assert training == {name for name, module in model.backbone.model.named_modules() if module.training}
        found = {name: p.grad for name, p in parameters.items()} | {"embeddings": own.grad}
        assert all(gradient is not None for gradient in found.values())
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    kept, again = gradients(on=False), gradients(on=True)
    for name, gradient in kept.items():
        assert torch.allclose(again[name], gradient, rtol=1e-5, atol=1e-7), name
    assert kept["embeddings"].abs().max() > 0


def test_gradient_checkpointing_leaves_nothing_behind(personal: Build) -> None:
    model = personal()
    with gradient_checkpointing(model.backbone.model, True):
        pass
    logits = model.answer_logits(collate(rows_of(), pad=0), RowContext())
    assert not logits.requires_grad
