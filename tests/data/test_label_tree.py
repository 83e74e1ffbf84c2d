"""The tree of labels' tokens, against sets of their beginnings."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from proper.data.label_tree import LabelTree

Path = tuple[int, ...]
LABELS = st.lists(st.lists(st.integers(3, 6), min_size=1, max_size=5), min_size=1, max_size=9)


def beginnings(path: Path) -> list[Path]:
    return [path[:end] for end in range(1, len(path) + 1)]


@given(LABELS)
def test_nodes_and_edges_are_the_beginnings_of_labels(given_labels: list[list[int]]) -> None:
    labels = [tuple(label) for label in given_labels]
    inner = sorted({path for label in labels for path in beginnings(label[:-1])})
    number = {(): 0} | {path: at for at, path in enumerate(inner, start=1)}
    edges = sorted({path for label in labels for path in beginnings(label)}, key=lambda path: (number[path[:-1]], path))
    tree = LabelTree.of(labels)
    assert tree.tokens.tolist() == [path[-1] for path in inner]
    assert tree.depth.tolist() == [len(path) - 1 for path in inner]
    assert tree.sees.tolist() == [[other in beginnings(path) for other in inner] for path in inner]
    assert tree.start.tolist() == [number[path[:-1]] for path in edges]
    assert tree.target.tolist() == [path[-1] for path in edges]
    assert tree.member.tolist() == [[float(path in beginnings(label)) for label in labels] for path in edges]


def test_one_token_labels_need_no_node() -> None:
    tree = LabelTree.of([[5], [4]])
    assert tree.size == 0 and tree.sees.shape == (0, 0) and tree.depth.dtype == tree.tokens.dtype == torch.long
    assert tree.target.tolist() == [4, 5] and tree.start.tolist() == [0, 0]
