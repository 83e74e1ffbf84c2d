"""Columns of item evidence: other users' answers from histories, counted the slow way, and nothing of any query."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proper.config import make_config
from proper.data.checks import require_no_leaks
from proper.data.dataset import Dataset, prepare
from proper.data.item_evidence import neutral
from proper.data.rows import parse_template
from proper.errors import DataError
from tests.data.conftest import count_words

PROMPT = "{input} | {item_mean} | {item_count}"
LABELS = "{input} | {item_usual} | {item_count}"
ROWS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.integers(1, 5)), min_size=8, max_size=30)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(drawn):
    """Return rows of these (user, item, answer), after some that every split needs: two labels, and a history."""
    drawn = [("a", "x", 1), ("a", "y", 2), ("a", "z", 3), *drawn, ("a", "x", 1)]
    return [
        {"user_id": user, "item_id": item, "input": f"text {at}", "output": str(answer), "timestamp": at}
        for at, (user, item, answer) in enumerate(drawn)
    ]


def config_of(path, prompt, kind, **data):
    return make_config(
        {
            "data": {"path": str(path), "prompt": prompt, **data},
            "task": {"kind": kind},
            "split": {"min_history": 1, "queries": 0.3},
        }
    )


def everything(dataset: Dataset):
    parts = dataset.connection.execute(
        """SELECT u.id, t.item, t.prompt, t.target, r.part, r.tokens FROM rows r
        JOIN users u ON u.number = r.user JOIN texts t ON t.id = r.text ORDER BY r.id"""
    )
    return parts.fetchall()


@settings(max_examples=25)
@given(ROWS, st.sampled_from(["rating", "classification"]))
def test_the_columns_are_the_other_users_histories(drawn, kind):
    with tempfile.TemporaryDirectory() as folder:
        path = write_jsonl(Path(folder) / "rows.jsonl", rows_of(drawn))
        config = config_of(path, PROMPT if kind == "rating" else LABELS, kind)
        with prepare(config, Path(folder) / "data.sqlite", count_words) as dataset:
            rows = everything(dataset)
    for user, item, prompt, target, _, tokens in rows:
        others = [row[3] for row in rows if row[4] == "history" and row[1] == item and row[0] != user]
        _, evidence, count = prompt.split(" | ")
        assert count == str(len(others)) and tokens == len(prompt.split()) + len(target.split())
        if not others:
            assert evidence == "unknown"
        elif kind == "rating":
            assert float(evidence) == pytest.approx(fmean(map(float, others)), abs=0.0501)
        else:
            assert Counter(others)[evidence] == max(Counter(others).values())


@settings(max_examples=15)
@given(ROWS, st.integers(1, 5))
def test_no_answer_of_a_query_enters_any_text(drawn, other):
    """The newest rows of each user are the queries: whatever they answer, every text stays."""
    with tempfile.TemporaryDirectory() as folder:
        texts = []
        rows = rows_of(drawn)
        for changed in (False, True):
            if changed:
                with Dataset.open(Path(folder) / "0.sqlite") as dataset:
                    asked = {row.prompt.split(" | ")[0] for row in dataset.queries()}
                rows = [{**row, "output": str(other)} if row["input"] in asked else row for row in rows]
            path = write_jsonl(Path(folder) / "rows.jsonl", rows)
            config = config_of(path, PROMPT, "rating")
            with prepare(config, Path(folder) / f"{int(changed)}.sqlite", count_words) as dataset:
                require_no_leaks(dataset)
                texts.append([(row[0], row[2], row[4]) for row in everything(dataset)])
        assert texts[0] == texts[1]


def test_a_column_of_the_files_comes_first(tmp_path):
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{**row, "item_mean": "theirs"} for row in rows_of([("a", "x", 1)] * 4)]
    )
    with prepare(
        config_of(path, "{item_mean} {input}", "generation"), tmp_path / "data.sqlite", count_words
    ) as dataset:
        assert all(row[2].startswith("theirs text") for row in everything(dataset))


@pytest.mark.parametrize(
    ("prompt", "kind", "data", "says"),
    [
        ("{input} {item_mean}", "classification", {}, "'{item_mean}' does not go with task.kind classification"),
        ("{input} {item_usual}", "rating", {}, "'{item_usual}' does not go with task.kind rating"),
        ("{input} {item_count}", "generation", {}, "'{item_count}' does not go with task.kind generation"),
        ("{input} {item_mean}", "rating", {"item": None}, "'{item_mean}' needs data.item"),
        ("{input} {item_mean}", "rating", {"item": "none"}, r"no row has one in column 'none' \(data.item\)"),
    ],
)
def test_what_cannot_be_computed_is_refused(tmp_path, prompt, kind, data, says):
    rows = [{**row, "none": None} for row in rows_of([("a", "x", 1)] * 4)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=says.replace("{", "\\{")):
        prepare(config_of(path, prompt, kind, **data), tmp_path / "data.sqlite", count_words)


@pytest.mark.parametrize(
    ("split", "warned"),
    [({}, False), ({"by": "item"}, True), ({"shared_items": "exclude"}, True)],
)
def test_a_split_without_evidence_for_any_query_is_said(tmp_path, caplog, split, warned):
    rows = rows_of([(user, item, 3) for item in "uvwxyz" for user in "abc"])
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = make_config(
        {**config_of(path, PROMPT, "rating").model_dump(), "split": {"min_history": 1, "queries": 0.5, **split}}
    )
    with prepare(config, tmp_path / "data.sqlite", count_words) as dataset:
        unknown = [" unknown " in query.prompt for query in dataset.queries()]
    assert all(unknown) == warned
    said = "data.prompt: '{item_mean}' is unknown in every query, since no other user's history has an item of a query"
    assert [record.message.split(" (")[0] for record in caplog.records] == [said] * warned


def test_a_request_without_the_columns_gets_neutral_texts():
    template = neutral(parse_template(PROMPT, "data.prompt"))
    assert template.fill({"input": "a film"}) == "a film | unknown | 0"
    assert template.fill({"input": "a film", "item_mean": 3.5, "item_count": 7}) == "a film | 3.5 | 7"
