"""Pieces of a streamed answer, joined, are the decoded answer; nothing that could still change is sent."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper.inference.stream import TextStream, overlap
from proper.models.backbone import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("proper-nano")


def pieces_of(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stop)
    return [*(stream.push(token) for token in ids), stream.close()], stream


@given(ids=st.lists(st.integers(3, 8191), max_size=20), text=st.text(max_size=12))
def test_pieces_joined_are_the_answer(tokenizer: Any, ids: list[int], text: str) -> None:
    ids = ids + tokenizer(text, add_special_tokens=False).input_ids
    pieces, _ = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True).strip()


@given(stop=st.text(alphabet="ab .\n", min_size=1, max_size=4), text=st.text(alphabet="ab .\n", max_size=30))
def test_a_stop_text_ends_the_answer_before_it(tokenizer: Any, stop: str, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces, stream = pieces_of(tokenizer, ids, (stop,))
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(pieces) == whole.partition(stop)[0].strip()
    assert stream.stopped == (stop in whole)


@pytest.mark.parametrize(("text", "answer"), [("\nlate", ""), ("late\n", "late"), ("late", "late")])
def test_a_newline_at_the_beginning_or_the_end_is_a_stop(tokenizer: Any, text: str, answer: str) -> None:
    pieces, stream = pieces_of(tokenizer, tokenizer(text, add_special_tokens=False).input_ids, ("\n",))
    assert ("".join(pieces), stream.stopped) == (answer, "\n" in text)


def test_half_a_character_waits_for_the_other_half(tokenizer: Any) -> None:
    ids = tokenizer("x 🎈", add_special_tokens=False).input_ids
    pieces, _ = pieces_of(tokenizer, ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces) == "x 🎈"


def test_overlap() -> None:
    assert [overlap("abc", stop) for stop in ("cd", "bcd", "abcd", "x", "c", "abc")] == [1, 2, 3, 0, 0, 0]
