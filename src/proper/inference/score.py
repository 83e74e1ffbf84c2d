"""Log-likelihoods of fixed labels after a prompt, by tree attention: the prompt is computed once for all labels.

    log p(label | prompt) = sum of the log-probabilities of its tokens and of the end token

The labels form a tree: a prefix that several labels share is one branch. All branches of a prompt run in one row behind
the prompt's KV cache, and a mask lets every token see the prompt and the earlier tokens of its own branch, so that
nothing is computed or stored twice. Beyond `LABEL_TOKENS` tokens the labels form several trees, one pass each: mask and
logits of one tree grow with the square of its tokens and with the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from proper.console import Advance, no_advance
from proper.data.batching import by_length, collate, position_ids
from proper.data.encoder import EncodedExample
from proper.data.label_tree import LabelTree
from proper.errors import InputError, ProperError
from proper.inference.forward import pad_left
from proper.inference.generate import require_pairs
from proper.inference.model import BatchModel
from proper.layers.batch_context import RowContext
from proper.models.label_choice import takes_trees
from proper.models.personal import ProperModel

LABEL_TOKENS = 1024
"""Maximum label tokens, over all prompts of a batch, that are scored at once: each needs a row of logits."""

Group = tuple[list[int], LabelTree]
"""Indices of some labels, and their tree."""


def score(
    model: BatchModel,
    prompts: Sequence[str],
    user_ids: Sequence[str | None],
    labels: Sequence[str],
    advance: Advance = no_advance,
    task: int = 0,
) -> Float[Tensor, "B L"]:
    """Return the log-likelihood (nats) of every label after every prompt, each prompt for its own user.

    `advance` is called with the number of prompts of each batch once it is done; `task` is the number of the prompts'
    task in a run of several.

    Raises:
        InputError: see `require_pairs`; or there is no label.
        StoreError: a user's adapter or embedding is damaged.
        ProperError: a likelihood is NaN; the message names the user.
    """
    require_pairs(prompts, user_ids)
    if isinstance(labels, str) or not labels or not all(isinstance(label, str) for label in labels):
        raise InputError("the labels are a list of one text or more")
    tokens = [model.encoder.answer(label) for label in labels]
    room = max(len(label) for label in tokens)
    encoded = [model.encoder.prompt(prompt, room=room) for prompt in prompts]
    found = torch.empty(len(prompts), len(labels))
    size = max(1, min(model.config.compute.batch_size, LABEL_TOKENS // sum(map(len, tokens))))
    groups = label_groups(tokens)
    for chunk in by_length([len(ids) for ids in encoded], size, model.model.backbone.batch_tokens):
        rows = model.rows([user_ids[i] for i in chunk], task)
        found[chunk] = score_labels(model.model, [encoded[i] for i in chunk], tokens, rows, groups).cpu()
        advance(len(chunk))
    for at in found.isnan().any(1).nonzero().flatten().tolist():
        raise ProperError(f"user {user_ids[at]!r}: the likelihoods are not finite")
    return found


def score_labels(
    model: ProperModel,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    rows: RowContext,
    groups: Sequence[Group] | None = None,
) -> Float[Tensor, "B L"]:
    """Return log-likelihoods (nats, fp32) of every label's tokens after every prompt.

    `groups` is what `label_groups` returns for the labels; callers with many batches build it once.
    """
    found = torch.empty(len(prompts), len(labels), device=model.device)
    with torch.no_grad():
        if not takes_trees(model.backbone.model, max(map(len, prompts)) + max(map(len, labels))):
            return _row_by_row(model, prompts, labels, rows)
        for members, tree in label_groups(labels) if groups is None else groups:
            with model.routing.use(rows):
                edges = _edges(model, prompts, tree)
            found[:, members] = edges @ tree.member.to(edges.device)
    return found


def label_groups(labels: Sequence[Sequence[int]]) -> list[Group]:
    """Return trees of at most `LABEL_TOKENS` tokens, each with its labels; labels that share a beginning stay close.

    A single tree keeps the labels' order. A longer label has a tree of its own.
    """
    if sum(map(len, labels)) <= LABEL_TOKENS:
        return [(list(range(len(labels))), LabelTree.of(labels))]
    groups: list[list[int]] = []
    room = 0
    for at in sorted(range(len(labels)), key=lambda at: tuple(labels[at])):
        if len(labels[at]) > room:
            groups.append([])
            room = LABEL_TOKENS
        groups[-1].append(at)
        room -= len(labels[at])
    return [(members, LabelTree.of([labels[at] for at in members])) for members in groups]


def _edges(model: ProperModel, prompts: Sequence[Sequence[int]], tree: LabelTree) -> Float[Tensor, "B E"]:
    """Return the log-probability (nats, fp32) of every edge's token after every prompt."""
    backbone, device = model.backbone.model, model.device
    ids, mask = pad_left(prompts, model.backbone.pad_id, device)
    positions = position_ids(mask)
    # A cache layer without a window for every layer: `takes_trees` has checked that no window is shorter.
    cache = DynamicCache()
    prompt = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "logits_to_keep": 1}
    first: Tensor = backbone(**prompt, past_key_values=cache, use_cache=True).logits[:, -1:]
    found = [_after(first, tree.start[tree.start == 0], tree.target[tree.start == 0])]
    if tree.size:
        size = (len(prompts), tree.size)
        sees = torch.cat([mask.bool()[:, None].expand(*size, -1), tree.sees.to(device).expand(*size, -1)], dim=2)
        hidden = torch.zeros(sees.shape, dtype=backbone.dtype, device=device)
        hidden.masked_fill_(~sees, torch.finfo(backbone.dtype).min)
        rest: Tensor = backbone(
            input_ids=tree.tokens.to(device).expand(size),
            attention_mask=hidden.unsqueeze(1),
            position_ids=positions[:, -1:] + 1 + tree.depth.to(device),
            past_key_values=cache,
            use_cache=True,
        ).logits
        found.append(_after(rest, tree.start[tree.start > 0] - 1, tree.target[tree.start > 0]))
    return torch.cat(found, dim=1)


def _after(logits: Float[Tensor, "B N V"], start: Int[Tensor, "E"], target: Int[Tensor, "E"]) -> Float[Tensor, "B E"]:
    """Return the log-probability of token `target` at position `start` of each given edge."""
    return logits.log_softmax(-1, dtype=torch.float32)[:, start.to(logits.device), target.to(logits.device)]


def _row_by_row(
    model: ProperModel, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], rows: RowContext
) -> Float[Tensor, "B L"]:
    """Return the same as the tree without a KV cache, one label at a time, for any backbone."""
    found = []
    for label in labels:
        whole = [EncodedExample(str(at), (*prompt, *label), len(prompt)) for at, prompt in enumerate(prompts)]
        batch = collate(whole, model.backbone.pad_id, model.device)
        found.append(-model.answer_losses(batch, rows)[0])
    return torch.stack(found, dim=1)
