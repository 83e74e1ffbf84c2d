"""Weights of several tasks: an answer counts alike whatever its length, and a row's weight is a factor on its loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper.config import make_config
from proper.data.batching import collate
from proper.data.dataset import prepare
from proper.data.encoder import EncodedExample, HistoryRow
from proper.data.task_weights import WeightedEncoder, task_weights, with_task_weights

TASKS: dict[str, dict[str, Any]] = {
    "label": {"data": {"prompt": "{input}", "target": "{short}"}, "task": {"kind": "classification"}},
    "text": {"data": {"prompt": "{input}", "target": "{long}"}, "weight": 2},
}


class Words:
    """An encoder of one token per word."""

    max_length = 64

    def encode(self, example: HistoryRow, /) -> EncodedExample:
        """Encode prompt and answer as their words' lengths."""
        prompt, answer = (tuple(map(len, text.split())) for text in (example.prompt, example.target))
        return EncodedExample(example.user, prompt + answer, len(prompt), task=example.task)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), min_size=1, max_size=30),
    st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
)
def test_a_mean_answer_of_every_task_counts_as_wanted(rows: list[tuple[int, int]], wanted: list[float]) -> None:
    weights = task_weights(rows, wanted)
    assert sum(weights[task] * length for task, length in rows) == pytest.approx(sum(length for _, length in rows))
    shares = []
    for task in {task for task, _ in rows}:
        lengths = [length for other, length in rows if other == task]
        shares.append(weights[task] * sum(lengths) / len(lengths) / wanted[task])
    assert shares == pytest.approx([shares[0]] * len(shares))


def test_a_task_without_rows_has_weight_one() -> None:
    assert task_weights([(0, 5)], [1.0, 3.0]) == [1.0, 1.0]
    assert task_weights([], [1.0, 3.0]) == [1.0, 1.0]


def test_the_rows_of_a_run_get_the_weight_of_their_task(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [
        {"user_id": f"u{user}", "timestamp": at, "input": f"thing {at}", "short": "ab"[at % 2], "long": "a b c d"}
        for user in range(3)
        for at in range(12)
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    tasks = {name: {**task, "data": {**task["data"], "path": str(data)}} for name, task in TASKS.items()}
    config = make_config({"tasks": tasks, "split": {"min_history": 1, "shared_items": "allow"}})
    encoder = Words()
    with prepare(config, tmp_path / "data.sqlite", lambda prompts, _: [1] * len(prompts)) as dataset:
        weighted = with_task_weights(config, dataset, encoder, seed=0)
        assert isinstance(weighted, WeightedEncoder) and weighted.max_length == 64
        examples = list(dataset.sample("all", None, 0).rows(0))
        found = {example.task: weighted.encode(example).weight for example in examples}
        # A label has 1 token, a text 4 and twice the weight of an answer: per token 1 to 1/2.
        assert found[0] / found[1] == pytest.approx(2)
        one = make_config({"data": {"path": str(data), "prompt": "{input}", "target": "{short}"}})
        assert with_task_weights(one, dataset, encoder, seed=0) is encoder


def test_a_batch_has_weights_only_where_a_row_has_one() -> None:
    rows = [EncodedExample("u", (1, 2, 3), 2), EncodedExample("u", (1, 2, 3), 2, weight=0.5)]
    assert collate(rows[:1], pad=0).weights is None
    weights = collate(rows, pad=0).weights
    assert weights is not None and weights.tolist() == [1, 0.5]
