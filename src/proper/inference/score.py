"""Log-likelihoods of fixed labels after a prompt, by tree attention: the prompt is computed once for all labels.

    log p(label | prompt) = sum of the log-probabilities of its tokens and of the end token

The labels form a tree: a prefix that several labels share is one branch. All branches of a prompt run in one row behind
the prompt's KV cache, and a mask lets every token see the prompt and the earlier tokens of its own branch, so that
nothing is computed or stored twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from proper.data.batching import by_length, collate
from proper.data.encoder import EncodedExample
from proper.errors import ProperError
from proper.inference.forward import pad_left
from proper.inference.model import BatchModel
from proper.layers.batch_context import RowContext
from proper.models.personal import ProperModel

LABEL_TOKENS = 1024
"""Maximum label tokens, over all prompts of a batch, that are scored at once: each needs a row of logits."""


@dataclass(frozen=True)
class LabelTree:
    """L labels' tokens as a tree of N inner nodes and E edges; an edge is a token after the prompt or after a node.

    Attributes:
        tokens: the token of each inner node (one that is followed by another token).
        depth: number of label tokens before the node.
        sees: whether node i attends to node j: j is i or one of its ancestors.
        start: the node that an edge leaves, counted from 1; 0 for the prompt, whose edges come first.
        target: the token of each edge.
        member: 1 where an edge belongs to a label, else 0.
    """

    tokens: Int[Tensor, "N"]
    depth: Int[Tensor, "N"]
    sees: Bool[Tensor, "N N"]
    start: Int[Tensor, "E"]
    target: Int[Tensor, "E"]
    member: Float[Tensor, "E L"]

    @classmethod
    def of(cls, labels: Sequence[Sequence[int]]) -> LabelTree:
        """Build the tree of these labels' tokens."""
        inner = sorted({tuple(label[:end]) for label in labels for end in range(1, len(label))})
        number = {(): 0} | {path: at for at, path in enumerate(inner, start=1)}
        paths = {tuple(label[:end]) for label in labels for end in range(1, len(label) + 1)}
        edges = sorted(paths, key=lambda path: (number[path[:-1]], path))
        sees = torch.zeros(len(inner), len(inner), dtype=torch.bool)
        for at, path in enumerate(inner):
            sees[at, [number[path[:end]] - 1 for end in range(1, len(path) + 1)]] = True
        index = {path: at for at, path in enumerate(edges)}
        member = torch.zeros(len(edges), len(labels))
        for at, label in enumerate(labels):
            member[[index[tuple(label[:end])] for end in range(1, len(label) + 1)], at] = 1.0
        return cls(
            tokens=torch.tensor([path[-1] for path in inner], dtype=torch.long),
            depth=torch.tensor([len(path) - 1 for path in inner], dtype=torch.long),
            sees=sees,
            start=torch.tensor([number[path[:-1]] for path in edges]),
            target=torch.tensor([path[-1] for path in edges]),
            member=member,
        )

    @property
    def size(self) -> int:
        """Number of inner nodes: the label tokens that are computed behind each prompt."""
        return len(self.tokens)


def score(
    model: BatchModel, prompts: Sequence[str], user_ids: Sequence[str | None], labels: Sequence[str]
) -> Float[Tensor, "B L"]:
    """Return the log-likelihood (nats) of every label after every prompt, each prompt for its own user.

    Raises:
        StoreError: a user's adapter or embedding is damaged.
        ProperError: a likelihood is NaN; the message names the user.
    """
    tokens = [model.encoder.answer(label) for label in labels]
    room = max(len(label) for label in tokens)
    encoded = [model.encoder.prompt(prompt, room=room) for prompt in prompts]
    found = torch.empty(len(prompts), len(labels))
    size = max(1, min(model.config.compute.batch_size, LABEL_TOKENS // sum(map(len, tokens))))
    for chunk in by_length([len(ids) for ids in encoded], size, model.model.backbone.batch_tokens):
        rows = model.rows([user_ids[i] for i in chunk])
        found[chunk] = score_labels(model.model, [encoded[i] for i in chunk], tokens, rows).cpu()
    for at in found.isnan().any(1).nonzero().flatten().tolist():
        raise ProperError(f"user {user_ids[at]!r}: the likelihoods are not finite")
    return found


def score_labels(
    model: ProperModel, prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], rows: RowContext
) -> Float[Tensor, "B L"]:
    """Return log-likelihoods (nats, fp32) of every label's tokens after every prompt."""
    with torch.no_grad():
        if not _takes_trees(model, max(map(len, prompts)) + max(map(len, labels))):
            return _row_by_row(model, prompts, labels, rows)
        tree = LabelTree.of(labels)
        with model.routing.use(rows):
            edges = _edges(model, prompts, tree)
        return edges @ tree.member.to(edges.device)


def _edges(model: ProperModel, prompts: Sequence[Sequence[int]], tree: LabelTree) -> Float[Tensor, "B E"]:
    """Return the log-probability (nats, fp32) of every edge's token after every prompt."""
    backbone, device = model.backbone.model, model.device
    ids, mask = pad_left(prompts, model.backbone.pad_id, device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # A cache layer without a window for every layer: `_takes_trees` has checked that no window is shorter.
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


def _takes_trees(model: ProperModel, length: int) -> bool:
    """Whether the backbone accepts a 4-D attention mask, and no layer's window is shorter than `length`."""
    backbone = model.backbone.model
    config = backbone.config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    takes_masks = getattr(backbone, "_supports_attention_backend", False) and not getattr(
        backbone, "_is_stateful", False
    )
    return bool(takes_masks) and all(window is None or length <= window for window in windows)


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
