"""Pieces of a streamed answer, joined, are the decoded answer; nothing that could still change is sent."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proper.inference.detokenizer import Detokenizer, overlap
from proper.models.backbone import load_tokenizer
from tests import tokenizer_kinds


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("proper-nano")


def pieces_of(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], Detokenizer]:
    stream = Detokenizer(tokenizer, stop)
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


KINDS = ["chatml", "byte_fallback", "unigram", "word_level", "word_piece"]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    return tokenizer_kinds.KINDS[request.param]()


@given(numbers=st.lists(st.integers(0, 10**6), max_size=24))
@settings(max_examples=150)
def test_of_every_kind_of_tokenizer_the_stream_is_the_whole(kind: Any, numbers: list[int]) -> None:
    """Clean-up takes spaces out after the fact, and one bad byte undoes a run of good ones."""
    ids = [number % len(kind) for number in numbers]
    _is_the_whole(kind, ids)


@given(text=st.lists(st.sampled_from([" ", ".", "'", "n't", "'s", "'re", "?", ",", "it", "do", "we"])).map("".join))
@settings(max_examples=100)
def test_what_clean_up_rewrites_is_held_back(kind: Any, text: str) -> None:
    _is_the_whole(kind, kind(text, add_special_tokens=False).input_ids)


def test_bytes_that_are_text_until_another_comes() -> None:
    tokenizer = tokenizer_kinds.byte_fallback()
    good, bad = ["▁the", "<0xC3>", "<0xA9>"], ["▁the", "<0xC3>", "<0xA9>", "<0xC3>", "▁t"]
    _is_the_whole(tokenizer, tokenizer.convert_tokens_to_ids(good))
    _is_the_whole(tokenizer, tokenizer.convert_tokens_to_ids(bad))
    assert tokenizer.decode(tokenizer.convert_tokens_to_ids(bad)).strip() == "the\ufffd\ufffd\ufffd t"


def test_only_where_clean_up_happens_is_anything_held_back_for_it() -> None:
    """Llama 3's files ask for clean-up too, and transformers does not do it for byte-level tokenizers."""
    tokenizer = tokenizer_kinds.chatml()
    tokenizer.clean_up_tokenization_spaces = True
    pieces, _ = pieces_of(tokenizer, tokenizer("the bus was late", add_special_tokens=False).input_ids)
    assert pieces[0]


def _is_the_whole(tokenizer: Any, ids: list[int]) -> None:
    pieces, _ = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True).strip()


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
