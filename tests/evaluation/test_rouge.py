from __future__ import annotations

import os
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer, tokenize

from proper.data.words import latin_words, search_words, word_starts, words
from proper.evaluation.metrics import TaskInfo, score
from proper.evaluation.rouge import rouge_1, rouge_l

OWN, LAMP = TaskInfo("notes", "generation"), TaskInfo("lamp-4", "generation", official=True)
ASCII = st.text(st.characters(max_codepoint=127), max_size=60) | st.text("ab c-'_1\n", max_size=60)


@given(st.text(max_size=60) | ASCII)
def test_latin_words_are_those_of_the_library_in_any_text(text: str) -> None:
    assert latin_words(text) == tokenize.tokenize(text, None)


@given(ASCII, ASCII)
def test_figures_of_ascii_text_are_those_of_the_library_to_the_last_bit(gold: str, answer: str) -> None:
    wanted = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=False).score(gold, answer)
    assert rouge_1(words(gold), words(answer)) == wanted["rouge1"].fmeasure
    assert rouge_l(words(gold), words(answer)) == wanted["rougeL"].fmeasure


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("всё Хорошо, спасибо!", "всё хорошо спасибо"),
        ("L'été à Kraków", "l été à kraków"),
        ("Straße STRASSE", "strasse strasse"),
        ("Καλημέρα κόσμε", "καλημέρα κόσμε"),
        ("שלום \u202eעולם", "שלום עולם"),
        ("مرحبا بالعالم ١٢٣", "مرحبا بالعالم ١٢٣"),
        ("می\u200cخواهم", "میخواهم"),
        ("हिन्दी में लिखो।", "हिन्दी में लिखो"),
        ("안녕하세요 세계", "안녕하세요 세계"),
        ("今天2024年ＡＢ，天气好。", "今 天 2024 年 ab 天 气 好"),
        ("とても良いデーター", "と て も 良 い デ ー タ ー"),
        ("ดีมาก ก็", "ดี ม า ก ก็"),
        ("สวัสดี", "ส วั ส ดี"),
        ("ខ្ញុំ", "ខ្ ញុំ"),
        ("great 👍🏽 👍 ❤️", "great 👍 👍 ❤"),
        ("🙂", "🙂"),
        ("naïve_snake x²", "naïve snake x2"),
        ("a\u200bб", "a б"),
        ("…«»", ""),
    ],
)
def test_words_of_every_script(text: str, wanted: str) -> None:
    expected = [unicodedata.normalize("NFKC", word) for word in wanted.split()]
    assert words(text) == expected
    # Composed or decomposed is the same text.
    assert words(unicodedata.normalize("NFD", text)) == expected


@given(st.text(max_size=60) | ASCII)
def test_words_to_search_by_are_the_same_but_for_identifiers(text: str) -> None:
    assert [part for word in search_words(text) for part in words(word.replace("_", " "))] == words(text)


def test_an_identifier_is_one_word_to_search_by_beside_any_script() -> None:
    assert search_words("Fix max_length") == ["fix", "max_length"]
    assert search_words("Исправить max_length") == ["исправить", "max_length"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("don't stop, foo_bar", ["don't ", "stop, ", "foo_bar"]),
        ("今天天气好。", ["今", "天", "天", "气", "好。"]),
        ("用Python写 code", ["用Python", "写 ", "code"]),
        ("मुझे हिन्दी पसंद", ["मुझे ", "हिन्दी ", "पसंद"]),
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("초과근무 승인", ["초과근무 ", "승인"]),
        ("wow 🎉🎉", ["wow ", "🎉🎉"]),
    ],
)
def test_where_words_start(text: str, wanted: list[str]) -> None:
    starts = word_starts(text)
    assert [text[one:other] for one, other in zip(starts, [*starts[1:], len(text)], strict=True)] == wanted


@given(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=30))
def test_a_right_answer_in_any_script_is_right(text: str) -> None:
    assert rouge_1(words(text), words(text)) == rouge_l(words(text), words(text)) == 1


def test_own_data_is_seen_in_any_script_and_the_benchmark_stays_official(make) -> None:
    rows = make([("a", "всё хорошо спасибо", "всё хорошо спасибо"), ("a", "天气好", "天气坏")])
    assert score("rouge1", rows, OWN) == score("rougeL", rows, OWN) == pytest.approx((1 + 2 / 3) / 2)
    assert score("rouge1", rows, LAMP) == score("rougeL", rows, LAMP) == 0


NO_HOME = """
import os, pwd, sys
def unknown(_): raise KeyError("uid not found")
pwd.getpwuid = unknown  # as for a uid without an entry in /etc/passwd, which only root could take on
assert os.path.expanduser("~") == "~"
import {module}
assert not {"nltk", "rouge_score"} & {*sys.modules}
"""


@pytest.mark.parametrize(
    "module", ["proper.evaluation.metrics", pytest.param("proper.pipeline", marks=pytest.mark.slow)]
)
def test_nothing_needs_a_home_directory(tmp_path, module: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "USER", "LOGNAME")}
    code = NO_HOME.replace("{module}", module)
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True, timeout=120)
    assert list(tmp_path.iterdir()) == []
