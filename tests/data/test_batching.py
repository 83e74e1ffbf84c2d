"""Texts to left-padded batches: what truncation keeps, where answers lie, which rows go together."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proper.data.batching import IGNORED, collate, number_users, similar_batches
from proper.data.encoder import EncodedExample, Encoder
from proper.models.backbone import load_tokenizer


@dataclass(frozen=True)
class Row:
    prompt: str
    target: str
    user: str = "u"
    task: int = 0
    tokens: int = 0


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("proper-nano")


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, 64)


_WORDS = ["a", "word", "🎈", "שלום", "and"]
TEXTS = st.text(min_size=0, max_size=300) | st.lists(st.sampled_from(_WORDS), max_size=200).map(" ".join)


@given(prompt=TEXTS, target=TEXTS, room=st.integers(8, 200))
@settings(max_examples=80)
def test_every_row_fits_and_keeps_head_tail_and_answer(tokenizer: Any, prompt: str, target: str, room: int) -> None:
    encoder = Encoder(tokenizer, room)
    whole = Encoder(tokenizer, 10**6)

    found, full = encoder.encode(Row(prompt, target)), whole.encode(Row(prompt, target))

    assert len(found.ids) <= room and 0 <= found.start < len(found.ids)
    answer, full_answer = found.ids[found.start :], full.ids[full.start :]
    assert answer[-1] == encoder.end and answer[:-1] == full_answer[:-1][: len(answer) - 1]
    assert answer == full_answer or len(answer) == room // 2
    if len(full.ids) <= room and answer == full_answer:
        assert found == full
    elif found.ids[: found.start] != full.ids[: full.start]:
        assert len(found.ids) == room, "no more is cut than must be"
        limit = found.start
        tail = min(16, limit // 2)
        assert found.ids[: limit - tail] == full.ids[: limit - tail]
        assert tail == 0 or found.ids[limit - tail : limit] == full.ids[full.start - tail : full.start]


@given(rows=st.lists(st.tuples(TEXTS, TEXTS), max_size=6))
@settings(max_examples=40)
def test_counting_is_encoding_without_truncation(tokenizer: Any, rows: list[tuple[str, str]]) -> None:
    whole = Encoder(tokenizer, 10**6)
    expected = [len(whole.encode(Row(prompt, target)).ids) for prompt, target in rows]
    assert whole.count([prompt for prompt, _ in rows], [target for _, target in rows]) == expected


def test_an_answer_is_joined_by_one_space_and_closed(encoder: Encoder) -> None:
    encoded = encoder.encode(Row("The colour is", "  red\n"))
    assert encoder.tokenizer.decode(encoded.ids[:-1]) == "The colour is red"
    assert encoded.ids[-1] == encoder.end == 2
    assert encoded.ids[: encoded.start] == encoder.prompt("The colour is")
    assert encoder.answer("") == (*encoder.answer(" ")[:-1], 2)


def test_the_last_words_of_a_long_prompt_stay(encoder: Encoder) -> None:
    question = "So which colour is it?"
    ids = encoder.prompt("Once upon a time " + "there was a colour " * 100 + question)
    text = encoder.tokenizer.decode(ids)
    assert len(ids) == 64 and text.startswith("Once upon a time") and text.endswith(question)


@given(rows=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6)), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_collate(rows: list[tuple[int, int]], seed: int) -> None:
    random_ids = random.Random(seed)
    encoded = [
        EncodedExample(str(at), tuple(random_ids.randrange(3, 99) for _ in range(prompt + answer)), prompt)
        for at, (prompt, answer) in enumerate(rows)
    ]

    batch = collate(encoded, pad=0)

    length, answers = max(len(row.ids) for row in encoded), max(answer for _, answer in rows)
    assert batch.input_ids.shape == (len(rows), length) and batch.labels.shape == (len(rows), answers)
    assert batch.tokens == sum(len(row.ids) for row in encoded)
    assert batch.users == tuple(row.user for row in encoded)
    for at, row in enumerate(encoded):
        gap = length - len(row.ids)
        assert batch.input_ids[at].tolist() == [0] * gap + list(row.ids)
        assert batch.attention_mask[at].tolist() == [0] * gap + [1] * len(row.ids)
        assert batch.position_ids[at, gap:].tolist() == list(range(len(row.ids)))
        answer = list(row.ids[row.start :])
        assert batch.labels[at].tolist() == [IGNORED] * (answers - len(answer)) + answer
        assert torch.equal(batch.labels[at, -len(answer) :], batch.input_ids[at, -len(answer) :])


@given(
    lengths=st.lists(st.integers(1, 50), max_size=120),
    size=st.integers(1, 9),
    window=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_similar_batches_hold_every_row_once(lengths: list[int], size: int, window: int, seed: int) -> None:
    rows = [Row(str(at), "", tokens=length) for at, length in enumerate(lengths)]
    batches = list(similar_batches(iter(rows), size, random.Random(seed), window))
    assert Counter(row for batch in batches for row in batch) == Counter(rows)
    assert len(batches) == -(-len(rows) // size)
    assert all(0 < len(batch) <= size for batch in batches)
    again = list(similar_batches(iter(rows), size, random.Random(seed), window))
    assert again == batches


def test_similar_batches_are_similar_and_shuffled() -> None:
    rows = [Row(str(at), "", tokens=(at * 37) % 64) for at in range(64)]
    batches = list(similar_batches(iter(rows), 4, random.Random(0)))
    assert all(max(row.tokens for row in batch) - min(row.tokens for row in batch) < 8 for batch in batches)
    firsts = [batch[0].tokens for batch in batches]
    assert firsts != sorted(firsts)


def test_memory_holds_one_window() -> None:
    taken = 0

    def stream() -> object:
        nonlocal taken
        for at in range(1000):
            taken += 1
            yield Row(str(at), "", tokens=1)

    next(similar_batches(stream(), 4, random.Random(0), window=3))  # type: ignore[arg-type]
    assert taken == 12


def test_numbering_users() -> None:
    assert number_users(["b", "a", "b", "c", "a"]) == (["b", "a", "c"], [0, 1, 0, 2, 1])
    assert number_users([]) == ([], [])
