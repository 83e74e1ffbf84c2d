"""What stands in front of a prompt: only the user's own, strictly earlier items, the best ones, as far as they fit."""

from __future__ import annotations

import itertools
import re
import sqlite3
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proper.data.checks import leaks, require_no_leaks
from proper.data.dataset import Dataset
from proper.data.derived.copies import cut_queries, rewrite, shuffle_users
from proper.data.derived.retrieval import Kind, add_profiles, retrieve, template_profile
from proper.errors import DataError


def make_rows(users: dict[str, int]) -> list[dict[str, Any]]:
    return [
        {"user_id": user, "timestamp": at, "input": f"{user} asks {at}", "output": f"answer {at % 3}"}
        for user, size in users.items()
        for at in range(size)
    ]


def count(prompt: str, target: str) -> int:
    return len(prompt.split()) + len(target.split())


@pytest.fixture
def rows():
    made = make_rows({"a": 20, "b": 15, "c": 3})
    for at, row in enumerate(made):
        row["input"] = f"{row['user_id']} word{at % 4} text{at}"
    return made


@pytest.fixture
def dataset(build, rows) -> Dataset:
    return build(rows)


def test_every_item_in_front_is_the_users_own_and_earlier(dataset: Dataset, tmp_path: Path) -> None:
    retrieve(dataset, tmp_path / "rag.sqlite", 2, count, 100)
    with Dataset.open(tmp_path / "rag.sqlite") as rag:
        assert leaks(rag) == [] and rag.sha256 != dataset.sha256
        users = [user.id for user in dataset.users()]
        plain = {row.id: row for user in users for row in (*dataset.history(user), *dataset.queries(user))}
        sources = dict.fromkeys(plain, ())
        for row, source in rag.connection.execute("SELECT row, source FROM sources ORDER BY rowid"):
            sources[row] = (*sources[row], source)
        seen = 0
        for user in rag.users():
            history = dataset.history(user.id)
            for row in (*rag.history(user.id), *rag.queries(user.id)):
                own = plain[row.id]
                assert (row.user, row.target, row.time) == (own.user, own.target, own.time)
                assert row.prompt.endswith(own.prompt) and row.tokens == count(row.prompt, row.target)
                earlier = [item.id for item in history if item.time < own.time]
                assert set(sources[row.id]) <= set(earlier) and len(sources[row.id]) == min(2, len(earlier))
                for source in sources[row.id]:
                    assert f"{plain[source].prompt} {plain[source].target}" in row.prompt
                seen += len(sources[row.id])
        assert seen > 20


def test_the_best_item_stands_nearest(build, tmp_path: Path) -> None:
    rows = make_rows({"a": 15})
    for at, row in enumerate(rows):
        row["input"] = f"plain text {at}"
    rows[2]["input"], rows[-1]["input"] = "a zebra crossing 2", "the zebra 14"
    retrieve(build(rows), tmp_path / "rag.sqlite", 2, count, 100)
    with Dataset.open(tmp_path / "rag.sqlite") as rag:
        (last,) = (query.prompt.split("\n\n") for query in rag.queries() if "the zebra 14" in query.prompt)
        assert len(last) == 3 and last[1].startswith("a zebra crossing 2") and last[2] == "the zebra 14"


@pytest.mark.parametrize(
    ("asked", "similar", "other"),
    [
        ("昨日は京都でラーメンを食べた", "京都のラーメンは安い", "会議は三時に始まる"),
        ("今天北京下雨了", "北京的雨很大", "我喜欢足球比赛"),
        ("मुझे चाय पसंद है", "चाय पीना पसंद है", "मौसम गरम हो गया"),
        ("ฉันชอบแมวดำ", "แมวดำน่ารัก", "ประชุมบ่ายสาม"),
    ],
)
def test_an_item_of_any_script_is_found_by_its_words(
    build, tmp_path: Path, asked: str, similar: str, other: str
) -> None:
    rows = make_rows({"a": 15})
    for at, row in enumerate(rows):
        row["input"], row["output"] = f"{other} {at}", "x"
    rows[2]["input"], rows[-1]["input"] = similar, asked
    retrieve(build(rows), tmp_path / "rag.sqlite", 1, lambda prompt, target: len(prompt) + len(target), 200)
    with Dataset.open(tmp_path / "rag.sqlite") as rag:
        (last,) = (query.prompt for query in rag.queries() if query.prompt.strip().endswith(asked))
        assert last.startswith(similar)


def test_an_item_without_spaces_is_cut_at_a_letter(build, tmp_path: Path) -> None:
    rows = make_rows({"a": 15})
    for at, row in enumerate(rows):
        row["input"], row["output"] = f"{at:02}京都のラーメンは安くてとても美味しいので毎週食べに行く", "食"
    rows[-1]["input"] = "京都のラーメン"
    retrieve(build(rows), tmp_path / "rag.sqlite", 1, lambda prompt, target: len(prompt) + len(target), 24)
    with Dataset.open(tmp_path / "rag.sqlite") as rag:
        (last,) = (query.prompt for query in rag.queries() if query.prompt.endswith("\n京都のラーメン"))
    assert len(last) == 23 and last.startswith("味しいので毎週食べに行く 食")


def test_items_that_do_not_fit_are_cut_and_counted(dataset: Dataset, tmp_path: Path) -> None:
    retrieve(dataset, tmp_path / "rag.sqlite", 4, count, 9)
    with Dataset.open(tmp_path / "rag.sqlite") as rag:
        everything = [row for user in rag.users() for row in (*rag.history(user.id), *rag.queries(user.id))]
        assert max(row.tokens for row in everything) <= 9
        assert cut_queries(rag) == len(list(rag.queries())) > 0
    retrieve(dataset, tmp_path / "all.sqlite", 1, count, 100)
    with Dataset.open(tmp_path / "all.sqlite") as rag:
        assert cut_queries(rag) == 0


def test_a_profile_knows_nothing_of_what_comes_later(dataset: Dataset, tmp_path: Path) -> None:
    told: dict[int, list[float]] = {}

    def write(earlier, kind):
        return "times " + " ".join(str(item.time) for item in earlier)

    add_profiles(dataset, tmp_path / "pag.sqlite", "generation", count, 1000, write)
    with Dataset.open(tmp_path / "pag.sqlite") as pag:
        require_no_leaks(pag)
        for user in pag.users():
            for row in (*pag.history(user.id), *pag.queries(user.id)):
                times = [float(t) for t in re.findall(r"times ([\d. ]+)\n", row.prompt) for t in t.split()]
                told[row.id] = times
                assert all(time < row.time for time in times)
                expected = [item.time for item in dataset.history(user.id) if item.time < row.time]
                assert times == expected
    assert max(map(len, told.values())) >= 8


def test_only_the_rows_that_are_read_get_a_profile_and_their_number_is_told(dataset: Dataset, tmp_path: Path) -> None:
    query = next(row for row in dataset.queries() if row.user == "a")
    done: list[int] = []
    add_profiles(dataset, tmp_path / "pag.sqlite", "generation", count, 1000, only={query.id}, advance=done.append)
    with Dataset.open(tmp_path / "pag.sqlite") as pag:
        rows = [row for user in pag.users() for row in (*pag.history(user.id), *pag.queries(user.id))]
        assert [row.id for row in rows if row.prompt.startswith("Profile: ")] == [query.id] and done == [1]


def test_profiles_in_words(dataset: Dataset) -> None:
    history = dataset.history("a")
    assert template_profile(history, "classification").startswith("Profile: often ")
    assert template_profile(history, "generation").startswith("Profile: about ")


def test_a_profile_counts_the_words_of_all_answers(dataset: Dataset) -> None:
    answers = ["Late again, late", "the early BIRD", "", "Bird bird early again"] * 3
    history = [replace(item, target=text) for item, text in zip(dataset.history("a"), answers, strict=False)]
    words = [re.findall(r"\w+", item.target.casefold()) for item in history]
    counts = Counter(word for own in words for word in dict.fromkeys(own) if len(word) > 3)
    usual = ", ".join(word for word, _ in counts.most_common(8))
    length = sum(map(len, words)) / len(words)
    for _ in range(2):  # also from the cache
        assert template_profile(history, "generation") == f"Profile: about {length:.0f} words, often {usual}."


def test_a_later_item_in_a_prompt_is_a_leak(dataset: Dataset, tmp_path: Path) -> None:
    retrieve(dataset, tmp_path / "rag.sqlite", 1, count, 100)
    connection = sqlite3.connect(tmp_path / "rag.sqlite")
    history, query = (
        connection.execute(f"SELECT id FROM rows WHERE user = 1 AND part = '{part}' LIMIT 1").fetchone()[0]
        for part in ("history", "query")
    )
    connection.execute("INSERT INTO sources VALUES (?, ?)", (history, query))
    connection.commit()
    connection.close()
    with Dataset.open(tmp_path / "rag.sqlite") as rag, pytest.raises(DataError, match="not earlier is in its prompt"):
        require_no_leaks(rag)


def test_shuffling_again_gives_the_same_and_another_seed_another(dataset: Dataset, tmp_path: Path) -> None:
    texts = []
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        shuffle_users(dataset, tmp_path / name, seed)
        with Dataset.open(tmp_path / name) as shuffled:
            texts.append([row.prompt for row in shuffled.history("a")])
    assert texts[0] == texts[1] != texts[2]


def test_a_failed_rewriting_leaves_no_file(dataset: Dataset, tmp_path: Path) -> None:
    def broken():
        yield from ()
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError):
        rewrite(dataset, tmp_path / "half.sqlite", "half", broken())
    assert not list(tmp_path.glob("half*"))


@pytest.mark.parametrize("kind", ["embedding", "both"])
def test_embeddings_rank_the_items_that_have_one(dataset: Dataset, tmp_path: Path, kind: Kind) -> None:
    random = np.random.default_rng(0)
    rows = {row.id: row for user in "ab" for row in (*dataset.history(user), *dataset.queries(user))}
    # Of user b, only the newest items and the queries have vectors; user c has none.
    known = [row.id for row in rows.values() if row.user == "a" or row.time >= 6]
    made = random.normal(size=(len(known), 4)).astype(np.float32)
    vectors = dict(zip(known, made / np.linalg.norm(made, axis=1, keepdims=True), strict=True))
    for name, given in (("bm25", None), (kind, vectors)):
        retrieve(dataset, tmp_path / f"{name}.sqlite", 99, count, 10**6, given, kind)
    with Dataset.open(tmp_path / "bm25.sqlite") as by_words, Dataset.open(tmp_path / f"{kind}.sqlite") as found:
        assert leaks(found) == []
        orders = [
            {row: [s for _, s in found] for row, found in itertools.groupby(each.connection.execute(
                "SELECT row, source FROM sources ORDER BY row, rowid"), key=lambda pair: pair[0])}
            for each in (by_words, found)
        ]  # fmt: skip
    for row, words in orders[0].items():
        alike = [item for item in words if row in vectors and item in vectors]
        alike.sort(key=lambda item: (vectors[item] @ vectors[row], item), reverse=True)
        if not alike:
            want = words
        elif kind == "embedding":
            want = alike
        else:
            places = [{item: at for at, item in enumerate(order, 1)} for order in (words, alike)]
            merged = {item: sum(1 / (60 + place[item]) for place in places if item in place) for item in words}
            want = sorted(merged, key=lambda item: (merged[item], item), reverse=True)
        assert orders[1][row] == want


def test_only_the_wanted_rows_get_items(dataset: Dataset, tmp_path: Path) -> None:
    wanted = {row.id for row in dataset.queries("a")} | {dataset.history("b")[-1].id}
    retrieve(dataset, tmp_path / "rag.sqlite", 2, count, 100, only=wanted)
    with Dataset.open(tmp_path / "rag.sqlite") as rag:
        assert {row for (row,) in rag.connection.execute("SELECT DISTINCT row FROM sources")} == wanted


def test_items_share_what_the_row_leaves(build, tmp_path: Path) -> None:
    text = " ".join(f"w{at}" for at in range(60))
    rows = [{"user_id": "u", "timestamp": at, "input": f"{text} x{at}", "output": f"answer {at}"} for at in range(16)]
    source = build(rows)
    for longest, items in ((63 + 4 * 30, 4), (63 + 30, 1), (63 + 2 * 64, 4)):
        path = tmp_path / f"{longest}.sqlite"
        retrieve(source, path, 4, count, longest)
        with Dataset.open(path) as rag:
            for row in rag.queries():
                assert row.tokens == count(row.prompt, row.target) <= longest
                assert len(re.findall(r"answer \d+\n", row.prompt)) == items
