"""In every family the LM head runs on the answers' tokens only, and their losses are those of all logits."""

from __future__ import annotations

import torch

from proper.data.batching import Batch
from proper.models.answer_loss import answer_logits, answer_loss, answer_losses
from proper.models.backbone import Backbone


def test_losses_of_answer_tokens_only(backbone: Backbone, batch: Batch) -> None:
    rows: list[int] = []
    head = backbone.model.get_output_embeddings()
    head.register_forward_hook(lambda _, __, output: rows.append(output.shape[0] * output.shape[1]))
    with torch.no_grad():
        losses, counts = answer_losses(backbone.model, batch)
        expected, numbers = answer_loss(answer_logits(backbone.model, batch), batch.labels)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(counts, numbers)
    assert rows == [int(counts.sum()), batch.labels.numel()] and rows[0] < rows[1]
