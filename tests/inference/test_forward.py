"""Fast against slow: the engine's passes over mixed batches against one user, one row and no cache."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from proper.inference.forward import pad_left
from proper.layers.batch_context import RowContext
from proper.models.personal import ProperModel
from tests import decoding

Build = Callable[..., ProperModel]
Reference = Callable[..., PreTrainedModel]

SLOTS = (0, 2, -1, 1, 0, 2)
NEW = 12


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 8000, (length,), generator=generator).tolist() for length in (4, 19, 7, 1, 12, 7)]


def embeddings() -> Tensor:
    return 0.5 * torch.randn(len(SLOTS), 16, generator=torch.Generator().manual_seed(3))


def mixed(mode: str = "users") -> RowContext:
    return RowContext(mode, embedding=embeddings(), slots=torch.tensor(SLOTS))  # type: ignore[arg-type]


def next_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
    return found


@pytest.mark.parametrize("router", ["residual", "paper", "none"])
@pytest.mark.parametrize("mode", ["groups", "fit", "users"])
def test_fp32_logits_are_the_slow_ones_and_greedy_tokens_the_same(
    personal: Build, reference: Reference, router: str, mode: str
) -> None:
    model, rows = personal(router=router), mixed(mode)

    answers = decoding.ours(model, prompts(), rows, NEW)

    ids, mask = pad_left(prompts(), 0, model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), model.routing.use(rows):
        logits = model.backbone.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
    for at, prompt in enumerate(prompts()):
        slow = reference(model, embeddings()[at], SLOTS[at], mode)
        assert float((logits[at] - next_logits(slow, prompt)).abs().max()) < 1e-4
        seen = list(prompt)
        for token in answers[at]:
            assert token == int(next_logits(slow, seen).argmax()), f"row {at}"
            seen.append(token)
        assert len(seen) == len(prompt) + NEW


def test_in_bf16_the_first_divergence_is_at_a_near_tie(personal: Build, reference: Reference) -> None:
    model = personal(torch.bfloat16)
    answers = decoding.ours(model, prompts(), mixed(), NEW)
    agreed = 0
    for at, prompt in enumerate(prompts()):
        slow = reference(model, embeddings()[at], SLOTS[at])
        seen = list(prompt)
        for token in answers[at]:
            logits = next_logits(slow, seen)
            best = logits.topk(2).values
            if token != int(logits.argmax()):
                assert float(best[0] - best[1]) <= 0.05, f"row {at}, token {len(seen) - len(prompt)}"
                break
            seen.append(token)
            agreed += 1
    assert agreed > len(SLOTS) * NEW / 2


def test_rows_do_not_depend_on_the_batch_or_its_order(personal: Build) -> None:
    model, rows = personal(), mixed()
    assert rows.embedding is not None and rows.slots is not None
    together = decoding.ours(model, prompts(), rows, NEW)
    for at, prompt in enumerate(prompts()):
        own = RowContext("users", rows.embedding[[at]], rows.slots[[at]])
        assert decoding.ours(model, [prompt], own, NEW) == [together[at]]
    order = [5, 2, 0, 4, 1, 3]
    shuffled = RowContext("users", rows.embedding[order], rows.slots[order])
    assert decoding.ours(model, [prompts()[at] for at in order], shuffled, NEW) == [together[at] for at in order]
    swapped = decoding.ours(model, prompts(), RowContext("users", rows.embedding, (rows.slots + 1) % 3), NEW)
    assert swapped != together, "whose adapter it is matters"


def test_padding(personal: Build) -> None:
    ids, mask = pad_left([[5, 6, 7], [8]], pad=0, device=torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
