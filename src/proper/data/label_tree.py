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
                f"{key}: the labels {_short(other)!r} and {_short(label)!r} have the same tokens in this backbone, at "
                "most half of compute.max_length; write them as one label, or choose another backbone"
            )


def _short(label: str) -> str:
    return label if len(label) <= 40 else f"{label[:17]}...{label[-18:]}"
