"""LaMP's files and OPPU's: every task, both splits, both layouts, and the traps."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from proper.config import Config
from proper.config.lamp_tasks import LAMP_TASKS
from proper.data.checks import leaks
from proper.errors import DataError
from tests import lamp_files
from tests.data.lamp_reading import bad_rows, config, edit, rows

TASKS = [name for name in LAMP_TASKS if name != "lamp-6"]
ONE_SIDED = {"lamp-1", "lamp-7"}
"""Tasks whose profile items are not worded like their questions."""


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["user", "time"])
def test_official_files_become_histories_and_queries(tmp_path: Path, prepare_run: Any, task: str, split: str) -> None:
    folder = lamp_files.write_lamp(tmp_path / "files", task, split=split, ids=split == "time")
    with prepare_run(config(folder, task)) as data:
        people = [*data.users()]
        # By user, each of the 8 people has one question; by time, the same 4 are asked in both parts.
        assert (len(people), sum(user.role == "target" for user in people)) == ((8, 4) if split == "user" else (4, 4))
        assert {user.queries for user in people if user.role == "target"} == {1}
        # The six items, and by time also the seventh and the train question; repeated items count once.
        assert {user.history for user in people if user.role == "target"} == {6 if split == "user" else 8}
        assert data.labels == list(LAMP_TASKS[task].labels)
        assert leaks(data) == []
        questions = {entry["id"]: entry for entry in json.loads((folder / "dev_questions.json").read_text())}
        golds = {gold["id"]: gold["output"] for gold in json.loads((folder / "dev_outputs.json").read_text())["golds"]}
        assert {query.item: query.prompt for query in data.queries()} == {
            identity: entry["input"] for identity, entry in questions.items()
        }
        assert {query.item: query.target for query in data.queries()} == golds
        for query in data.queries():
            times = [row.time for row in data.history(query.user)]
            assert query.time is None if split == "user" else query.time > max(times)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("layout", ["official", "oppu"])
def test_oppu_s_files_name_the_targets(tmp_path: Path, prepare_run: Any, task: str, layout: str) -> None:
    folder = lamp_files.write_oppu(tmp_path / "files", task, users=101, others=2)
    with prepare_run(config(folder, task, "oppu", data={"layout": layout})) as data:
        targets = {user.id: user for user in data.users("target")}
        assert set(targets) == {str(number) for number in range(101)}
        assert {(user.history, user.queries) for user in targets.values()} == {(6, 2)}
        assert leaks(data) == []


@pytest.mark.parametrize("task", TASKS)
def test_what_oppu_s_others_were_asked_is_their_history(tmp_path: Path, prepare_run: Any, task: str) -> None:
    folder = lamp_files.write_oppu(tmp_path / "files", task)
    with prepare_run(config(folder, task, "oppu")) as data:
        assert [(user.id, user.history, user.queries) for user in data.users("other")] == [
            (str(number), 8, 0) for number in (1000, 1001, 1002)
        ]
        assert Counter(query.user for query in data.queries()) == {"0": 2, "1": 2, "2": 2}


@pytest.mark.parametrize("task", [task for task in TASKS if task not in ONE_SIDED])
def test_items_are_worded_as_the_questions_are(tmp_path: Path, task: str) -> None:
    folder = lamp_files.write_lamp(tmp_path, task)
    entry = json.loads((folder / "dev_questions.json").read_text())[0]
    found = {row.prompt: row.target for row in rows(config(folder, task)) if not row.query}
    for item in entry["profile"]:
        assert found[lamp_files.ASKED[task](item)] == item[LAMP_TASKS[task].target]


OPPU_ENDS = {
    "lamp-1": "\nanswer:",
    "lamp-2m": " tag:",
    "lamp-2n": " category:",
    "lamp-3": "\n score:",
    "lamp-4": " headline:",
    "lamp-5": " title:",
    "lamp-7": "tweet:",
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("form", ["lamp", "oppu"])
def test_oppu_s_layout_asks_for_the_answer_and_never_ends_in_a_bracket(tmp_path: Path, task: str, form: str) -> None:
    folder = (lamp_files.write_lamp if form == "lamp" else lamp_files.write_oppu)(tmp_path, task)
    for row in rows(config(folder, task, form, data={"layout": "oppu"})):
        assert row.prompt.endswith(OPPU_ENDS[task])
        assert "{" not in row.prompt


def test_a_tweet_s_item_asks_only_for_what_it_does_not_show(tmp_path: Path) -> None:
    folder = lamp_files.write_lamp(tmp_path, "lamp-7")
    whole = {
        item["text"]
        for part in ("train", "dev")
        for entry in json.loads((folder / f"{part}_questions.json").read_text())
        for item in entry["profile"]
    }
    start = "Complete the following tweet: "
    items = [row for row in rows(config(folder, "lamp-7")) if row.prompt.startswith(start)]
    assert {f"{row.prompt.removeprefix(start)} {row.target}" for row in items} == whole
    edit(folder / "dev_questions.json", lambda entries: entries[0]["profile"].append({"id": "9", "text": "word"}))
    assert (start, "word") in {(row.prompt, row.target) for row in rows(config(folder, "lamp-7"))}


def test_a_prompt_of_one_s_own_may_use_the_fields(tmp_path: Path) -> None:
    folder = lamp_files.write_lamp(tmp_path, "lamp-3")
    found = rows(config(folder, "lamp-3", data={"prompt": "Review: {text}\nStars:"}))
    assert {row.prompt.startswith("Review: ") and row.prompt.endswith("\nStars:") for row in found} == {True}
    with pytest.raises(DataError, match="no column 'score_'"):
        rows(config(folder, "lamp-3", data={"target": "{score_}"}))


# Citations


def choices(settings: Config) -> dict[tuple[str, str], tuple[str, str, str]]:
    """User and title to both options and the answer, history only."""
    pattern = re.compile(r'title "(.*?)", which .*\[1\]: "(.*?)" \[2\]: "(.*?)"$')
    found = {}
    for row in rows(settings):
        if not row.query:
            title, first, second = pattern.search(row.prompt).groups()  # type: ignore[union-attr]
            found[row.user, title] = (first, second, row.target)
    return found


def test_a_citation_is_a_choice_with_a_fair_coin(tmp_path: Path) -> None:
    folder = lamp_files.write_oppu(tmp_path, "lamp-1", users=20, others=20, items=10, asked=0)
    entries = [
        entry
        for name in ("user_others", "user_top_100_history")
        for entry in json.loads((folder / f"{name}.json").read_text())
    ]
    cited = {(str(e["user_id"]), item["title"]): item["citation"] for e in entries for item in e["profile"]}
    authors = {item["title"]: str(e["user_id"]) for e in entries for item in e["profile"]}
    found = choices(config(folder, "lamp-1", "oppu"))
    assert len(found) == len(cited) == 400
    for (user, title), (first, second, answer) in found.items():
        right, wrong = (first, second) if answer == "[1]" else (second, first)
        assert right == cited[user, title]
        assert authors[wrong] != user
    share = Counter(answer for _, _, answer in found.values())["[1]"] / len(found)
    assert 0.42 < share < 0.58
    assert choices(config(folder, "lamp-1", "oppu")) == found


def test_without_citations_the_author_s_own_paper_stands_in(tmp_path: Path) -> None:
    folder = lamp_files.write_lamp(tmp_path, "lamp-1", ids=True)
    profiles: dict[str, list[str]] = {}
    for part in ("train", "dev"):
        for entry in json.loads((folder / f"{part}_questions.json").read_text()):
            profiles[entry["user_id"]] = [item["title"] for item in entry["profile"]]
    items = {key: choice for key, choice in choices(config(folder, "lamp-1")).items() if key[1] in profiles[key[0]]}
    assert len(items) == 48
    for (user, title), (first, second, answer) in items.items():
        right, wrong = (first, second) if answer == "[1]" else (second, first)
        assert right in profiles[user]
        assert right != title
        assert wrong not in profiles[user]


def test_several_citations_and_none(tmp_path: Path) -> None:
    folder = lamp_files.write_oppu(tmp_path, "lamp-1")

    def change(entries: Any) -> None:
        entries[0]["profile"][0]["citation"] = ["this", "that"]
        del entries[1]["profile"][1:], entries[1]["profile"][0]["citation"]

    edit(folder / "user_top_100_history.json", change)
    title = json.loads((folder / "user_top_100_history.json").read_text())[0]["profile"][0]["title"]
    bad = bad_rows(config(folder, "lamp-1", "oppu"))
    assert (bad.count, bad.first[0].partition(":2: ")[2]) == (
        1,
        "row: profile[0].citation: missing, and the author has no other paper to replace it",
    )
    edit(folder / "user_top_100_history.json", lambda entries: entries.pop(1) and None)
    assert {"this", "that"} & set(choices(config(folder, "lamp-1", "oppu"))["0", title])


def test_a_single_author_has_nobody_to_choose_against(tmp_path: Path) -> None:
    folder = lamp_files.write_oppu(tmp_path, "lamp-1", users=1, others=0)
    assert "no other author's paper to choose against" in bad_rows(config(folder, "lamp-1", "oppu")).first[0]
