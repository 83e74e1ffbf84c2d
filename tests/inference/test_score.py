"""Labels' likelihood on a shared prompt cache against one full forward pass per prompt and label."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from proper.inference.score import LABEL_TOKENS, _row_by_row, label_groups, score_labels
from proper.layers.batch_context import RowContext
from proper.models.label_choice import takes_trees
from proper.models.personal import ProperModel

LABELS = [[17, 2], [300, 301, 302, 2], [17, 9, 2], [4000, 2]]
SLOTS = (1, -1, 0, 2)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, 8000, (length,), generator=generator).tolist() for length in (6, 15, 1, 9)]


def embeddings() -> Tensor:
    return 0.5 * torch.randn(len(SLOTS), 16, generator=torch.Generator().manual_seed(3))


def by_full_passes(model: PreTrainedModel, prompt: list[int], labels: list[list[int]]) -> list[float]:
    found = []
    for label in labels:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + label]), use_cache=False).logits[0].double()
        likelihood = logits.log_softmax(-1)
        found.append(sum(float(likelihood[len(prompt) + at - 1, token]) for at, token in enumerate(label)))
    return found


@pytest.mark.parametrize("mode", ["groups", "fit", "users"])
@pytest.mark.parametrize("labels", [LABELS, [[17], [300], [5]], [[17, 9, 2]]], ids=["mixed", "one-token", "one-label"])
def test_likelihoods_of_mixed_rows(
    personal: Callable[..., ProperModel],
    reference: Callable[..., PreTrainedModel],
    mode: str,
    labels: list[list[int]],
) -> None:
    model = personal()
    rows = RowContext(mode, embedding=embeddings(), slots=torch.tensor(SLOTS))  # type: ignore[arg-type]

    found = score_labels(model, prompts(), labels, rows)

    assert found.shape == (len(SLOTS), len(labels)) and found.dtype == torch.float32
    for at, prompt in enumerate(prompts()):
        expected = by_full_passes(reference(model, embeddings()[at], SLOTS[at], mode), prompt, labels)
        assert found[at].tolist() == pytest.approx(expected, abs=1e-4)


def test_the_backbone_alone(personal: Callable[..., ProperModel]) -> None:
    model = personal()
    found = score_labels(model, prompts(), LABELS, RowContext())
    for at, prompt in enumerate(prompts()):
        assert found[at].tolist() == pytest.approx(by_full_passes(model.backbone.model, prompt, LABELS), abs=1e-4)


def test_scores_do_not_depend_on_the_other_labels_or_rows(personal: Callable[..., ProperModel]) -> None:
    model = personal()
    rows = RowContext("users", embedding=embeddings(), slots=torch.tensor(SLOTS))
    together = score_labels(model, prompts(), LABELS, rows)
    for at in range(len(SLOTS)):
        own = RowContext("users", embedding=embeddings()[[at]], slots=torch.tensor(SLOTS)[[at]])
        for number, label in enumerate(LABELS):
            alone = score_labels(model, [prompts()[at]], [label], own)
            assert float(alone[0, 0]) == pytest.approx(float(together[at, number]), abs=1e-4)


def test_many_labels_are_scored_in_trees_of_bounded_size(personal: Callable[..., ProperModel]) -> None:
    model = personal()
    rows = RowContext("users", embedding=embeddings(), slots=torch.tensor(SLOTS))
    draw = torch.Generator().manual_seed(8)
    labels = [torch.randint(3, 8000, (1 + at % 5,), generator=draw).tolist() for at in range(1000)]
    groups = label_groups(labels)
    assert sorted(at for members, _ in groups for at in members) == list(range(1000))
    assert len(groups) == 3 and all(len(tree.target) <= LABEL_TOKENS for _, tree in groups)
    found = score_labels(model, prompts(), labels, rows)
    some = [0, 1, 499, 998, 999]
    torch.testing.assert_close(
        found[:, some], score_labels(model, prompts(), [labels[at] for at in some], rows), atol=1e-4, rtol=1e-4
    )


def test_a_label_longer_than_a_tree_has_one_of_its_own() -> None:
    labels = [[5], list(range(3, 2003)), [4, 9]]
    assert [members for members, _ in label_groups(labels)] == [[1], [2, 0]]


def test_all_one_token_labels_are_a_distribution(personal: Callable[..., ProperModel]) -> None:
    model = personal()
    rows = RowContext("users", embedding=embeddings(), slots=torch.tensor(SLOTS))
    found = score_labels(model, prompts(), [[token] for token in range(8192)], rows)
    assert found.exp().sum(1).tolist() == pytest.approx([1.0] * len(SLOTS), abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(labels=st.lists(st.lists(st.integers(3, 6), min_size=1, max_size=5), min_size=1, max_size=8))
def test_labels_that_share_beginnings(personal: Callable[..., ProperModel], labels: list[list[int]]) -> None:
    """Few tokens, so that labels are often equal, or one is another's beginning."""
    model = personal()
    rows = RowContext("users", embedding=embeddings(), slots=torch.tensor(SLOTS))
    found = score_labels(model, prompts(), labels, rows)
    with torch.no_grad():
        torch.testing.assert_close(found, _row_by_row(model, prompts(), labels, rows), atol=1e-4, rtol=1e-4)


def test_a_window_shorter_than_the_row_is_respected(personal: Callable[..., ProperModel]) -> None:
    model = personal()
    model.backbone.model.config.sliding_window = 8
    try:
        assert not takes_trees(model.backbone.model, 9) and takes_trees(model.backbone.model, 8)
    finally:
        del model.backbone.model.config.sliding_window
