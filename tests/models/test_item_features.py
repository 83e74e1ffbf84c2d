"""Items' features are those of the formulas, and depend neither on the batch nor on experts and adapters."""

from __future__ import annotations

from collections.abc import Callable

import torch

from proper.data.encoder import EncodedExample
from proper.models.backbone import Backbone
from proper.models.item_features import item_features
from proper.models.personal import ProperModel

ITEMS = [
    EncodedExample("ann", (5, 6, 7, 8, 9, 11), 4),
    EncodedExample("bob", (12, 13, 14), 1),
    EncodedExample("ann", (20, 21, 22, 23, 24, 25, 26, 27, 28), 3, between=(5, 6)),
]


@torch.no_grad()
def slow(backbone: Backbone, item: EncodedExample) -> torch.Tensor:
    """One item, one answer token at a time; the surprise as W_y less the mean of W under the prediction."""
    model = backbone.model
    states = model.base_model(input_ids=torch.tensor([item.ids]), use_cache=False).last_hidden_state[0]
    answers = [at for at in range(item.start, len(item.ids)) if at not in item.between]
    head = model.get_output_embeddings().weight
    surprise = torch.zeros(states.shape[1], dtype=states.dtype)
    for at in answers:
        expected = (head @ states[at - 1]).softmax(0)
        surprise += head[item.ids[at]] - expected @ head
    prompt = states[: item.start]
    return torch.cat([prompt.mean(0), prompt[-1], states[answers].mean(0), surprise])


def test_features_are_those_of_the_slow_version(
    backbone: Callable[..., Backbone], personal: Callable[..., ProperModel]
) -> None:
    expected = torch.stack([slow(backbone(), item) for item in ITEMS])
    found = item_features(personal(), ITEMS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_an_item_does_not_depend_on_its_batch(personal: Callable[..., ProperModel]) -> None:
    model, seen = personal(), list[int]()
    alone = torch.cat([item_features(model, [item]) for item in ITEMS])
    torch.testing.assert_close(item_features(model, ITEMS, seen.append), alone, rtol=0, atol=1e-4)
    assert sum(seen) == len(ITEMS)
