"""Hidden states of prompts after the last layer of a backbone, for methods that use it as a fixed encoder of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from proper.console import progress
from proper.data.batching import by_length, position_ids
from proper.inference.forward import pad_left
from proper.models.backbone import Backbone

StateBatch = tuple[list[int], Float[Tensor, "B T H"], Int[Tensor, "B T"]]
"""Indices of some prompts, their hidden states (fp32, padded on the left) and their attention mask."""


def prompt_states(backbone: Backbone, prompts: Sequence[Sequence[int]], size: int, title: str) -> Iterator[StateBatch]:
    """Yield the hidden states of all prompts, in batches of at most `size` prompts of similar length.

    Args:
        backbone: the model; adapted layers without a row context count as the backbone's own.
        prompts: token ids of each prompt.
        size: maximum number of prompts in a batch.
        title: title of the progress bar.
    """
    with progress(title, len(prompts)) as advance:
        for chunk in by_length([len(ids) for ids in prompts], size, backbone.batch_tokens):
            ids, mask = pad_left([prompts[at] for at in chunk], backbone.pad_id, backbone.device)
            with torch.no_grad():
                states: Tensor = backbone.model.base_model(
                    input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False
                ).last_hidden_state
            yield chunk, states.float(), mask
            advance(len(chunk))


def mean_state(states: Float[Tensor, "B T H"], mask: Int[Tensor, "B T"]) -> Float[Tensor, "B H"]:
    """Return the mean of each prompt's hidden states over its tokens."""
    mean: Tensor = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    return mean
