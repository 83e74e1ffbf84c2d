"""Data of several tasks, and each task of it alone: the same rows, split and labels as data of that task only."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from proper.config import make_config
from proper.data.dataset import Dataset, prepare
from proper.data.histories import TextExample
from proper.data.one_task import one_task
from proper.data.summary import summarize
from proper.errors import ConfigError, DataError
from proper.pipeline import check

Rows = list[dict[str, Any]]
SPLIT = {"target_users": 3, "min_history": 2, "shared_items": "allow"}
TASKS: dict[str, dict[str, Any]] = {
    "colour": {"data": {"prompt": "colour of {input}", "target": "{output}"}, "task": {"kind": "classification"}},
    "name": {"data": {"prompt": "name of {input}", "target": "{output} {input}"}, "task": {"kind": "generation"}},
}


def spread(users: int, items: int) -> Rows:
    """Rows whose task is in the column `what`; every user has both tasks, alternately."""
    return [
        {"user_id": f"u{user}", "timestamp": at, "input": f"thing {at} {user}", "output": f"c{(user + at) % 3}"}
        | {"what": list(TASKS)[at % 2], "item_id": f"i{at}"}
        for user in range(users)
        for at in range(items + user)
    ]


def with_path(path: Path, **data: Any) -> dict[str, Any]:
    return {name: {**one, "data": {"path": str(path), **one["data"], **data}} for name, one in TASKS.items()}


def told(example: TextExample) -> tuple[Any, ...]:
    """All of an interaction but its number and its task."""
    return example.user, example.prompt, example.target, example.item, example.time, example.tokens


def count_words(prompts: Sequence[str], targets: Sequence[str]) -> list[int]:
    return [len(f"{prompt} {target}".split()) for prompt, target in zip(prompts, targets, strict=True)]


@pytest.fixture
def open_data(tmp_path: Path) -> Iterator[Callable[..., Dataset]]:
    with ExitStack() as opened:
        numbers = iter(range(100))

        def make(**raw: Any) -> Dataset:
            path = tmp_path / f"{next(numbers)}.sqlite"
            config = make_config({"split": SPLIT, **raw})
            return opened.enter_context(prepare(config, path, count_words))

        yield make


@pytest.mark.parametrize("by", ["time", "random"])
def test_a_task_of_several_has_the_rows_split_and_labels_of_that_task_alone(
    jsonl: Callable[[Rows], Path], open_data: Callable[..., Dataset], by: str
) -> None:
    path = jsonl(spread(5, 9))
    split = {**SPLIT, "by": by, "target_users": 5}
    both = open_data(tasks=with_path(path), split=split)
    assert both.tasks == ("colour", "name") and both.labels == ["c0", "c1", "c2"]
    for name, one in with_path(path).items():
        alone = open_data(**one, split=split)
        with one_task(both, name) as mine:
            assert list(mine.users()) == list(alone.users())
            assert mine.labels == alone.labels
            if by == "time":  # by chance, a row's place is by its digest, which names the task
                assert sorted(map(told, mine.queries())) == sorted(map(told, alone.queries()))
                for user in alone.users():
                    assert sorted(map(told, mine.history(user.id))) == sorted(map(told, alone.history(user.id)))
            assert {row.task for row in mine.queries()} == {both.tasks.index(name)}
            assert mine.sample("all", None, 0).size == alone.sample("all", None, 0).size
    assert len(both.history("u4")) == sum(len(list(mine_of(both, name, "u4"))) for name in both.tasks)


def mine_of(both: Dataset, name: str, user: str) -> list[TextExample]:
    with one_task(both, name) as mine:
        return mine.history(user)


@given(share=st.floats(0.05, 0.5), items=st.integers(8, 12))
@settings(max_examples=15)
def test_every_user_has_queries_of_every_task(share: float, items: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in spread(2, items)), encoding="utf-8")
        raw = {"tasks": with_path(path, task_column="what"), "split": {**SPLIT, "min_history": 1, "queries": share}}
        with prepare(make_config(raw), Path(folder) / "data.sqlite", count_words) as both:
            users = list(both.users("target"))
            assert users and all({row.task for row in both.queries(user.id)} == {0, 1} for user in users)


def test_a_record_says_its_task(jsonl: Callable[[Rows], Path], open_data: Callable[..., Dataset]) -> None:
    rows = spread(3, 8)
    both = open_data(tasks=with_path(jsonl(rows), task_column="what"))
    found = [row for user in both.users() for row in (*both.history(user.id), *both.queries(user.id))]
    assert len(found) == len(rows)
    assert {(row.task, row.prompt.split()[0]) for row in found} == {(0, "colour"), (1, "name")}
    summary = summarize(both)
    assert [line.split()[1] for line in summary.lines() if line.startswith("task")] == ["colour:", "name:"]
    assert sum(queries for *_, queries in summary.tasks.values()) == summary.queries
    with one_task(open_data(**with_path(jsonl(rows))["name"]), "") as same:
        assert same.tasks == ()


def test_a_task_without_rows_and_a_missing_column_are_named(
    jsonl: Callable[[Rows], Path], open_data: Callable[..., Dataset]
) -> None:
    path = jsonl([{**row, "what": "colour"} for row in spread(3, 8)])
    with pytest.raises(DataError, match="no row of the task 'name'"):
        open_data(tasks=with_path(path, task_column="what"))
    with pytest.raises(DataError, match=r"no column 'kind' \(data.task_column\)"):
        open_data(tasks=with_path(path, task_column="kind"))
    wrong = with_path(path)
    wrong["name"]["data"]["prompt"] = "{input} {item_mean}"
    with pytest.raises(DataError, match="need a run of one task"):
        open_data(tasks=wrong)


@pytest.mark.parametrize("split", [{"target_users": 2}, {"max_queries": 1}])
def test_a_task_without_a_query_is_named_before_anything_is_trained(
    jsonl: Callable[[Rows], Path], split: dict[str, Any]
) -> None:
    """Users of one task each: those with the longest histories have rows of the first task only."""
    rows = [{**row, "what": "name" if row["user_id"] in ("u0", "u1") else "colour"} for row in spread(5, 9)]
    tasks = with_path(jsonl(rows), task_column="what")
    assert check(make_config({"tasks": tasks, "split": {**SPLIT, "target_users": 5}}))
    with pytest.raises(DataError, match=r"tasks\.name: no query, since no target user has a row of it to ask"):
        check(make_config({"tasks": tasks, "split": {**SPLIT, **split}}))


def test_tasks_and_a_section_data_do_not_go_together() -> None:
    tasks = {"a": {"data": {"path": "x"}}, "b": {"data": {"path": "y"}, "task": {"kind": "rating"}}}
    config = make_config({"tasks": tasks})
    assert (config.data.path, config.task.kind) == ("x", "generation")
    assert make_config(config.model_dump()) == config
    assert {name: one.data.path for name, one in config.each_task.items()} == {"a": "x", "b": "y"}
    assert [config.task_number(name) for name in (None, "a", "b")] == [0, 0, 1]
    with pytest.raises(ConfigError, match="no task 'c'; the tasks are a, b"):
        config.task_number("c")
    for raw, said in (
        ({"tasks": tasks, "data": {"path": "z"}}, "leave the sections data and task out"),
        ({"tasks": {"a": {"data": {"pth": "x"}}}}, "unknown key 'tasks.a.data.pth'; did you mean 'path'"),
        ({"tasks": {"a": {"task": {}}}}, "'tasks.a.data' is missing"),
        ({"data": {"path": "x", "task_column": "t"}}, "has no `tasks`"),
    ):
        with pytest.raises(ConfigError, match=said):
            make_config(raw)


def two_shapes(size: int) -> Rows:
    """Rows of the task `colour`, then rows of the task `name`, which have other columns."""
    users = [{"user_id": f"u{at % 3}", "timestamp": at} for at in range(size)]
    first = [{**row, "what": "colour", "input": f"x {at}", "output": f"c{at // 3 % 2}"} for at, row in enumerate(users)]
    return first + [{**row, "what": "name", "thing": f"y {at}", "said": f"z {at}"} for at, row in enumerate(users)]


@pytest.mark.parametrize("files", [1, 2])
def test_rows_of_one_task_need_not_have_the_columns_of_another(
    tmp_path: Path, open_data: Callable[..., Dataset], files: int
) -> None:
    rows = two_shapes(1200)
    for number in range(files):
        own = rows if files == 1 else rows[number * 1200 : (number + 1) * 1200]
        (tmp_path / f"rows{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    path = tmp_path / "rows0.jsonl" if files == 1 else tmp_path
    tasks = with_path(path, task_column="what")
    tasks["name"]["data"] |= {"prompt": "{thing}", "target": "{said}"}
    assert summarize(open_data(tasks=tasks)).rows == 2400
    tasks["name"]["data"]["target"] = "{sais}"
    with pytest.raises(DataError, match=r"no column 'sais' \(data.target\)"):
        open_data(tasks=tasks)


def test_parquet_files_of_one_task_each(tmp_path: Path, open_data: Callable[..., Dataset]) -> None:
    rows = two_shapes(60)
    for number in range(2):
        table = arrow.Table.from_pylist(rows[number * 60 : (number + 1) * 60])
        parquet.write_table(table, tmp_path / f"rows{number}.parquet")
    tasks = with_path(tmp_path, task_column="what")
    tasks["name"]["data"] |= {"prompt": "{thing}", "target": "{said}"}
    assert summarize(open_data(tasks=tasks)).rows == 120


def test_rows_of_no_task_are_counted(
    jsonl: Callable[[Rows], Path], open_data: Callable[..., Dataset], caplog: pytest.LogCaptureFixture
) -> None:
    rows = spread(3, 8)
    strange = [{**rows[0], "what": what} for what in ("Name", "name ", None, "other", "Name")]
    path = jsonl([*rows, *strange])
    assert summarize(open_data(tasks=with_path(path, task_column="what"))).rows == len(rows)
    assert [record.message for record in caplog.records] == [
        f"{path}: 5 rows are of no task of this run: column 'what' has 'Name', 'name ', null"
    ]


def test_a_column_of_numbers_may_name_tasks(tmp_path: Path, open_data: Callable[..., Dataset]) -> None:
    rows = [{**row, "what": float(list(TASKS).index(row["what"]))} for row in spread(3, 8)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    tasks = with_path(tmp_path / "rows.parquet", task_column="what")
    assert summarize(open_data(tasks={str(at): task for at, task in enumerate(tasks.values())})).rows == len(rows)


def test_a_line_that_cannot_be_read_is_counted_once(jsonl: Callable[[Rows], Path], tmp_path: Path) -> None:
    path = jsonl(spread(3, 8))
    with path.open("a") as file:
        file.write("{\n")
    for more in ({}, {"task_column": "what"}):
        config = make_config({"split": SPLIT, "tasks": with_path(path, **more)})
        with prepare(config, tmp_path / "data.sqlite", count_words, skip_bad_rows=True) as both:
            assert summarize(both).bad_rows == 1


def test_a_task_with_bad_rows_only_is_named(jsonl: Callable[[Rows], Path], tmp_path: Path) -> None:
    path = jsonl(spread(3, 8))
    tasks = with_path(path)
    tasks["name"]["task"] = {"kind": "rating"}
    with pytest.raises(DataError, match="not one good row of the task 'name'; the first of 27 bad rows: "):
        prepare(
            make_config({"split": SPLIT, "tasks": tasks}), tmp_path / "data.sqlite", count_words, skip_bad_rows=True
        )


def test_answers_of_another_task_are_no_label_that_was_seen(
    jsonl: Callable[[Rows], Path], open_data: Callable[..., Dataset]
) -> None:
    rows = spread(3, 8)
    rows += [{**rows[0], "what": "name", "output": "rare", "timestamp": 40}]
    rows += [{**row, "timestamp": 50, "what": "colour", "output": "rare x", "input": "x"} for row in rows[:1]]
    tasks = with_path(jsonl(rows), task_column="what")
    tasks["name"]["data"]["target"] = "{output} x"
    found = summarize(open_data(tasks=tasks))
    assert (found.unseen_labels, found.unseen_label_queries) == (["rare x"], 1)
