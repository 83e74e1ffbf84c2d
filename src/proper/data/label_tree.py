"""Labels' tokens as a tree, and an interaction as a choice among labels (the `residual` form of the user prior).

A prefix that several labels share is one branch, so that all labels together cost few tokens behind one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from proper.errors import DataError


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
        # Labels in order, so that nodes are numbered in the order of their paths; node 0 is the prompt.
        parent, token, children = [0], [-1], [dict[int, int]()]
        for path in sorted({tuple(label) for label in labels}):
            at = 0
            for each in path:
                if each not in children[at]:
                    children[at][each] = len(parent)
                    parent.append(at)
                    token.append(each)
                    children.append({})
                at = children[at][each]
        inner = [node for node in range(1, len(parent)) if children[node]]
        number = {0: 0} | {node: at for at, node in enumerate(inner, start=1)}
        sees = torch.eye(len(inner), dtype=torch.bool)
        for at, node in enumerate(inner):
            if parent[node]:
                sees[at] |= sees[number[parent[node]] - 1]
        edges = sorted(range(1, len(parent)), key=lambda node: number[parent[node]])
        edge = {node: at for at, node in enumerate(edges)}
        member = torch.zeros(len(edges), len(labels))
        for column, label in enumerate(labels):
            at = 0
            for each in label:
                at = children[at][each]
                member[edge[at], column] = 1.0
        return cls(
            tokens=torch.tensor([token[node] for node in inner], dtype=torch.long),
            depth=sees.sum(1) - 1,
            sees=sees,
            start=torch.tensor([number[parent[node]] for node in edges]),
            target=torch.tensor([token[node] for node in edges]),
            member=member,
        )

    @property
    def size(self) -> int:
        """Number of inner nodes: the label tokens that are computed behind each prompt."""
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class LabelChoice:
    """The labels that an interaction's answer is chosen from.

    Attributes:
        tree: the tokens of the L labels.
        prior: what is added to the score of each label, as log pi_u(y) - log pi(y) (L,).
        answer: index of the true label.
    """

    tree: LabelTree
    prior: Float[Tensor, "L"]
    answer: int


def require_distinct(labels: Sequence[str], answer: Callable[[str], tuple[int, ...]], key: str) -> None:
    """Check that a model can tell the labels apart: a tokenizer may drop capitals or accents, and long labels are cut.

    Args:
        labels: the labels of a task.
        answer: returns an answer's tokens, see `Encoder.answer`.
        key: the config's key of the task, for the message.

    Raises:
        DataError: two labels have the same tokens.
    """
    known: dict[tuple[int, ...], str] = {}
    for label in labels:
        other = known.setdefault(answer(label), label)
        if other != label:
            raise DataError(
                f"{key}: the labels {_short(other)!r} and {_short(label)!r} have the same tokens in this backbone "
                "(labels are cut at half of compute.max_length); write them as one label, or choose another backbone"
            )


def _short(label: str) -> str:
    return label if len(label) <= 40 else f"{label[:17]}...{label[-18:]}"
