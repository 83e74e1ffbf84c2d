"""Values of LaMP's files and of the config: dates, labels, scores and texts, and one line for what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from proper.config import make_config
from proper.data.dataset import prepare
from proper.data.lamp.rows import moment
from proper.data.rows import BadValue
from proper.errors import ConfigError, DataError
from tests import lamp_files
from tests.data.conftest import count_words
from tests.data.lamp_reading import bad_rows, config, edit, rows


@pytest.mark.parametrize(
    ("value", "day"),
    [
        (2012, "2012-01-01"),
        (2012.0, "2012-01-01"),
        ("2012", "2012-01-01"),
        (20120131, "2012-01-31"),
        ("20120131", "2012-01-31"),
        ("2012-01-31", "2012-01-31"),
        ("2012-01-31 10:20:30", "2012-01-31T10:20:30"),
        (1327968000, "2012-01-31"),
        (1327968000000, "2012-01-31"),
        ("Mon Apr 06 22:19:45 PDT 2009", "2009-04-07T05:19:45"),
        ("Mon Apr 06 22:19:45 +0000 2009", "2009-04-06T22:19:45"),
        ("Mon Apr 06 22:19:45 2009", "2009-04-06T22:19:45"),
    ],
)
def test_dates_in_every_spelling(value: object, day: str) -> None:
    moved = day if "T" in day else f"{day}T00:00:00"
    assert moment(value) == datetime.fromisoformat(f"{moved}+00:00").timestamp()


def test_no_date_and_what_is_none() -> None:
    assert moment(None) is moment("") is None
    for value in ("yesterday", "Mon Foo 06 22:19:45 PDT 2009", 20121399, [2012], True):
        with pytest.raises(BadValue, match="date: .* is not a time"):
            moment(value)


def test_labels_are_taken_but_for_case_spaces_and_brackets(tmp_path: Path) -> None:
    folder = lamp_files.write_oppu(tmp_path, "lamp-2n", users=1, others=0)

    def respell(entries: Any) -> None:
        for item, label in zip(
            entries[0]["profile"], ("Style &  Beauty", " CRIME ", "sports\n", "crime", "crime", "crime"), strict=True
        ):
            item["category"] = label

    edit(folder / "user_top_100_history.json", respell)
    found = [row.target for row in rows(config(folder, "lamp-2n", "oppu")) if not row.query]
    assert found == ["style & beauty", "crime", "sports", "crime", "crime", "crime"]
    edit(folder / "user_top_100_history.json", lambda e: e[0]["profile"][2].update(category="gossip"))
    bad = bad_rows(config(folder, "lamp-2n", "oppu"))
    assert bad.count == 1
    assert ":1: output: 'gossip' is none of the task's labels" in bad.first[0]


@pytest.mark.parametrize("score", ["4", "4.0", 4, 4.0])
def test_a_score_is_the_label_of_its_value(tmp_path: Path, score: object) -> None:
    folder = lamp_files.write_oppu(tmp_path, "lamp-3", users=1, others=0)
    edit(folder / "user_top_100_history.json", lambda e: [i.update(score=score) for i in e[0]["profile"]] and None)
    assert {row.target for row in rows(config(folder, "lamp-3", "oppu")) if not row.query} == {"4"}


@pytest.mark.parametrize("gold", ["[1]", "1", "1]", " [1] ", 1])
def test_a_citation_s_gold_is_in_brackets(tmp_path: Path, gold: object) -> None:
    folder = lamp_files.write_oppu(tmp_path, "lamp-1")
    edit(folder / "user_top_100_history.json", lambda e: [q.update(gold=gold) for q in e[0]["query"]] and None)
    assert {row.target for row in rows(config(folder, "lamp-1", "oppu")) if row.query and row.user == "0"} == {"[1]"}


def test_headlines_keep_what_follows_a_colon(tmp_path: Path) -> None:
    folder = lamp_files.write_lamp(tmp_path, "lamp-4")
    assert all(row.target.startswith("Today: ") for row in rows(config(folder, "lamp-4")))


def test_quotes_and_markers_inside_a_text_are_text(tmp_path: Path) -> None:
    folder = lamp_files.write_oppu(tmp_path / "1", "lamp-1")
    item = {"title": 'On "quotes", and [1]: "them"'}
    asked = lamp_files.ASKED["lamp-1"](item, 'A "b" c', "D [2] e")
    edit(folder / "user_top_100_history.json", lambda e: e[0]["query"][0].update(input=asked))
    prompt = next(row.prompt for row in rows(config(folder, "lamp-1", "oppu", data={"layout": "oppu"})) if row.query)
    assert 'paper title: On "quotes", and [1]: "them"\nreference: [1] - A "b" c [2] - D [2] e\n' in prompt
    folder = lamp_files.write_oppu(tmp_path / "3", "lamp-3")
    asked = lamp_files.ASKED["lamp-3"]({"text": "My review: review: fine"})
    edit(folder / "user_top_100_history.json", lambda e: e[0]["query"][0].update(input=asked))
    prompt = next(row.prompt for row in rows(config(folder, "lamp-3", "oppu", data={"layout": "oppu"})) if row.query)
    assert prompt.endswith(" explanation. review: My review: review: fine\n score:")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda e: e[1].pop("id"), ":2: row: id: missing"),
        (lambda e: e[1].pop("profile"), ":2: row: profile: missing"),
        (lambda e: e[1].update(profile={}), ":2: row: profile: missing, or no list"),
        (lambda e: e[1]["profile"][3].pop("score"), ":2: row: profile[3].score: missing"),
        (lambda e: e[1]["profile"][3].update(text=None), ":2: row: profile[3].text: null"),
        (lambda e: e[1]["profile"][3].update(text="", score=""), ":2: output: empty"),
        (lambda e: e[1]["profile"][3].update(date="soon"), ":2: row: profile[3].date: 'soon' is not a time"),
        (lambda e: e[1]["profile"].append(7), ":2: row: profile[6].item: no object"),
        (
            lambda e: e[1]["profile"][3].update(id=2.0**53),
            ":2: row: profile[3].id: 9007199254740992.0: the id has lost digits; write it as text",
        ),
        (lambda e: e[1]["profile"][3].update(score="9"), ":2: output: '9' is none of the task's labels"),
        (lambda e: e[1].update(input="Rate this."), "': input: no question of lamp-3: 'review:' is missing"),
        (lambda e: e[1].update(id=e[0]["id"]), "no answer, or its answer is already used, in dev_outputs.json"),
        (lambda e: e.pop(), ": missing, and dev_outputs.json has its answer"),
        (lambda e: e.append("text"), ":5: row: no object"),
    ],
)
def test_a_bad_question_or_item_is_named_and_can_be_skipped(
    tmp_path: Path, change: Callable[[Any], Any], says: str
) -> None:
    folder = lamp_files.write_lamp(tmp_path / "files", "lamp-3")
    edit(folder / "dev_questions.json", lambda entries: change(entries) and None)
    settings = config(folder, "lamp-3")
    bad = bad_rows(settings)
    assert bad.first[0].startswith(f"{folder / 'dev_questions.json'}:")
    assert any(says in message for message in bad.first)
    with pytest.raises(DataError, match="--skip-bad-rows"):
        prepare(settings, tmp_path / "data.sqlite", count_words)
    prepare(settings, tmp_path / "data.sqlite", count_words, skip_bad_rows=True).close()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda e: e[1].pop("user_id"), ":2: row: user_id: missing"),
        (lambda e: e[1].update(user_id=True), ":2: row: user_id: missing, or neither text"),
        (lambda e: e[1].pop("query"), ":2: row: query: missing, or no list"),
        (lambda e: e[1]["query"][1].pop("gold"), ":2: row: query[1].gold: missing"),
        (lambda e: e[1]["query"].append([]), ":2: row: query[2].id: missing"),
        (lambda e: e[1].update(profile=None), ":2: row: profile: missing, or no list"),
        (lambda e: e.append(None), ":4: row: no object"),
    ],
)
def test_a_bad_entry_of_oppu_s_is_named(tmp_path: Path, change: Callable[[Any], Any], says: str) -> None:
    folder = lamp_files.write_oppu(tmp_path, "lamp-3")
    edit(folder / "user_top_100_history.json", lambda entries: change(entries) and None)
    bad = bad_rows(config(folder, "lamp-3", "oppu"))
    assert bad.count == 1
    assert says in bad.first[0]


def test_files_of_another_task_are_refused(tmp_path: Path) -> None:
    folder = lamp_files.write_lamp(tmp_path / "3", "lamp-3")
    with pytest.raises(DataError, match="task: 'LaMP_3'; data.task lamp-4 needs 'LaMP_4'"):
        rows(config(folder, "lamp-4"))
    # Both LaMP-2 call themselves LaMP_2, and the site's plain folder has the news.
    folder = lamp_files.write_lamp(tmp_path / "2", "lamp-2n")
    assert "profile[0].tag: missing" in bad_rows(config(folder, "lamp-2m")).first[0]
    edit(folder / "dev_outputs.json", lambda value: value.update(task="LaMP_2N"))
    assert rows(config(folder, "lamp-2n"))


def test_files_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder .*get it with: proper data fetch lamp-3$"):
        rows(config(tmp_path / "none", "lamp-3"))
    with pytest.raises(DataError, match=r"no such folder \(data.path\)"):
        rows(config(tmp_path / "none", "lamp-3", "oppu"))
    folder = lamp_files.write_lamp(tmp_path / "files", "lamp-3")
    for name in ("train_questions.json", "train_outputs.json"):
        (folder / name).unlink()
    assert len(rows(config(folder, "lamp-3"))) == 28
    (folder / "dev_outputs.json").unlink()
    with pytest.raises(DataError, match="dev_outputs.json: no such file"):
        rows(config(folder, "lamp-3"))
    (folder / "dev_questions.json").unlink()
    with pytest.raises(DataError, match="no dev_questions.json in this folder"):
        rows(config(folder, "lamp-3"))
    with pytest.raises(DataError, match="neither of user_top_100_history.json and user_more_100_history.json"):
        rows(config(folder, "lamp-3", "oppu"))


def test_files_that_are_cut_or_no_json(tmp_path: Path) -> None:
    folder = lamp_files.write_lamp(tmp_path, "lamp-3")
    questions = folder / "dev_questions.json"
    questions.write_bytes(questions.read_bytes()[:-500])
    with pytest.raises(DataError, match="dev_questions.json: not readable as JSON after entry 3: "):
        rows(config(folder, "lamp-3"))
    questions.write_text("<html>")
    with pytest.raises(DataError, match="dev_questions.json: not readable as JSON: "):
        rows(config(folder, "lamp-3"))


@pytest.mark.parametrize(
    ("golds", "says"),
    [
        ([{"id": "1", "output": "4"}, {"id": 1, "output": "5"}], ":2: id: '1' occurs twice"),
        ([{"id": "1"}], ":1: an answer has id and output"),
    ],
)
def test_bad_golds_are_named(tmp_path: Path, golds: Any, says: str) -> None:
    folder = lamp_files.write_lamp(tmp_path, "lamp-3")
    edit(folder / "dev_outputs.json", lambda value: value.update(golds=golds))
    with pytest.raises(DataError, match=f"dev_outputs.json{says}"):
        rows(config(folder, "lamp-3"))


def test_a_task_brings_its_kind_and_labels_and_the_file_may_differ(tmp_path: Path) -> None:
    settings = config(tmp_path, "LaMP_2M")
    assert (settings.data.task, settings.task.kind, len(settings.task.labels)) == ("lamp-2m", "classification", 15)
    other = {"data": settings.data.model_dump() | {"task": "lamp-3"}, "task": {"kind": "classification"}}
    assert make_config(other).task.kind == "classification"
    assert config(tmp_path, "lamp-5").task.labels == "auto"
    again = make_config(settings.model_dump())
    assert again == settings


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"format": "lamp"}, "'data': format: 'lamp' needs data.task, one of lamp-1, "),
        ({"task": "lamp-3"}, "'data': task: 'lamp-3' goes with format: lamp or oppu, not 'auto'"),
        ({"format": "lamp", "task": "lamp-2"}, "'data.task': should be 'lamp-1', 'lamp-2m'"),
        ({"format": "oppu", "task": "lamp-3", "layout": "mine"}, "'data.layout': should be 'official' or 'oppu'"),
    ],
)
def test_a_task_and_its_format_go_together(data: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"data": {"path": "x", **data}})
    assert says in str(caught.value)
