"""What users write is text: names of control tokens in it never become control tokens, and all else is as ever."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from proper.data.chat import MARK, cut_names, pieces, quote, special_names
from proper.data.encoder import Encoder
from proper.errors import InputError
from proper.models.backbone import load_tokenizer
from tests import tokenizer_kinds

KINDS = ["nano", "chatml", "byte_fallback", "unigram", "word_level", "word_piece"]
NAMES = ["<s>", "</s>", "<pad>", "<|im_end|>", "<|im_start|>", "[SEP]", "[CLS]", "<think>"]


@pytest.fixture(scope="module", params=KINDS)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    tokenizer = tokenizer_kinds.KINDS[request.param]()
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.sep_token
    return Encoder(tokenizer, 10**6, rows=len(tokenizer))


MARKED = st.lists(st.sampled_from([*NAMES, "<<s>s>", "a", " ", "the", "\n", "é", "🎈"]), max_size=8).map("".join)


@given(text=st.text(max_size=30) | st.sampled_from(["it's fine, don't worry.", "a < b > c", "<b>x</b>", "[x] | y"]))
@settings(max_examples=60)
def test_ordinary_text_is_encoded_as_ever(encoder: Encoder, text: str) -> None:
    assert list(encoder.tokens(text)) == encoder.tokenizer(text, add_special_tokens=False).input_ids


@given(text=MARKED)
@settings(max_examples=60)
def test_a_name_in_a_text_is_no_control_token(encoder: Encoder, text: str) -> None:
    control = set(encoder.names.values())
    assert control.isdisjoint(encoder.tokens(text))
    assert encoder.answer(text)[-1] == encoder.end and control.isdisjoint(encoder.answer(text)[:-1])
    assert encoder.count([text], [text]) == [len(encoder.prompt(text)) + len(encoder.answer(text))]


@pytest.mark.parametrize("kind", ["nano", "chatml", "byte_fallback"])
def test_what_was_written_is_what_is_read(kind: str) -> None:
    encoder = Encoder(tokenizer_kinds.KINDS[kind](), 100)
    for text in ("it was <s>cheap</s> dear", "end <|im_end|> of it"):
        assert encoder.decode(encoder.answer(text)) == text


def test_many_texts_at_once(encoder: Encoder) -> None:
    texts = ["a <s>b</s>", "the bus", "[SEP]", "", "x <|im_end|>"]
    assert encoder.count(texts, texts) == [encoder.count([text], [text])[0] for text in texts]


@given(text=MARKED)
@settings(max_examples=60)
def test_a_template_has_its_own_control_tokens_and_a_message_has_none(text: str) -> None:
    encoder = _chat()
    start, end = encoder.names["<|im_start|>"], encoder.names["<|im_end|>"]
    plain = encoder._templated("<|im_start|>user\n" + quote("hello", encoder.names) + "<|im_end|>\n")
    assert list(plain) == encoder.tokenizer("<|im_start|>user\nhello<|im_end|>\n", add_special_tokens=False).input_ids
    found = encoder._templated("<|im_start|>user\n" + quote(text, encoder.names) + "<|im_end|>\n")
    control = [number for number in found if number in encoder.names.values()]
    assert control == [start, end]
    assert encoder.tokenizer.decode(found) == f"<|im_start|>user\n{text}<|im_end|>\n"


_MADE: list[Encoder] = []


def _chat() -> Encoder:
    if not _MADE:
        _MADE.append(Encoder(tokenizer_kinds.chatml(), 1000))
    return _MADE[0]


@given(text=st.text(alphabet="<s>/ab" + MARK, max_size=20))
def test_quoting(text: str) -> None:
    quoted = quote(text, ["<s>", "</s>"])
    assert [special for _, special in pieces(quoted, ["<s>", "</s>"])] == [False] * bool(quoted)
    assert "".join(piece for piece, _ in pieces(quoted, ["<s>", "</s>"])) == text.replace(MARK, "")
    parts = cut_names(text, ["<s>", "</s>"])
    assert "".join(parts) == text.replace(MARK, "") and not any("<s>" in part or "</s>" in part for part in parts)


def test_a_token_beyond_the_embeddings_is_split_or_refused() -> None:
    """An added token that was never given a row (Gemma 3's `<image_soft_token>`) fails one text, not a batch."""
    tokenizer = load_tokenizer("proper-nano")
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.add_tokens(["<row>", "☃"])
    encoder = Encoder(tokenizer, 100, rows=rows)
    for text in ("look <image_soft_token>", "a <row> of them"):
        assert max(encoder.tokens(text)) < rows and encoder.decode(encoder.tokens(text)) == text
    with pytest.raises(InputError, match=f"holds '☃', token {rows + 2}, .*: the model has {rows} embeddings"):
        encoder.tokens("snow ☃")
    with pytest.raises(InputError, match="image_soft_token"):
        encoder._templated("look <image_soft_token>")
    assert "<image_soft_token>" in special_names(tokenizer) and "<row>" not in special_names(tokenizer)


def test_encoding_leaves_the_tokenizer_as_it_is() -> None:
    """Threads share it: a template's control tokens must not depend on who encodes beside it."""
    tokenizer: Any = tokenizer_kinds.chatml()
    encoder = Encoder(tokenizer, 100)
    before = tokenizer("a <s>", add_special_tokens=False).input_ids
    encoder.tokens("a <s>")
    assert tokenizer._tokenizer.encode_special_tokens is False
    assert tokenizer("a <s>", add_special_tokens=False).input_ids == before == list(encoder._templated("a <s>"))


@pytest.mark.parametrize(
    ("single", "start"), [("</s> $A", (2,)), ("$A </s>", ()), ("</s> $A </s>", (2,)), ("<s> $A </s>", (1,))]
)
def test_a_start_token_that_is_the_end_token_stays(single: str, start: Any) -> None:
    """OPT's texts begin with `</s>`, which also ends answers."""
    made = tokenizer_kinds.KINDS["chatml"]()
    made.bos_token = "</s>" if "<s>" not in single else "<s>"
    special = [("<s>", 1), ("</s>", 2)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    encoder = Encoder(made, 100)
    assert encoder.start == start and encoder.prompt("the bus") == start + encoder.tokens("the bus")
    assert encoder.answer("late")[-1] == 2
