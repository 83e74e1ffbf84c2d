"""LaMP's files and OPPU's: every task, both splits, both layouts, and the traps."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from proper.config import Config, make_config
from proper.config.lamp_tasks import LAMP_TASKS
from proper.data.dataset import Dataset, prepare
from proper.data.histories import TextExample
from proper.data.interactions import BadRows, Interaction, read_interactions
from proper.data.lamp.rows import moment
from proper.data.rows import BadValue
from proper.data.summary import leaks, summarize
from proper.data.text_files import json_entries
from proper.errors import ConfigError, DataError
from tests import lamp_files
from tests.data.conftest import count_words

TASKS = [name for name in LAMP_TASKS if name != "lamp-6"]
ONE_SIDED = {"lamp-1", "lamp-7"}
"""Tasks whose profile items are not worded like their questions."""


def config(folder: Path, task: str, form: str = "lamp", **sections: Any) -> Config:
    data = {"path": str(folder), "format": form, "task": task, **sections.pop("data", {})}
    sections["split"] = {"min_history": 1, **sections.get("split", {})}
    return make_config({"data": data, **sections})


def rows(settings: Config) -> list[Interaction]:
    bad = BadRows()
    found = list(read_interactions(settings.data, bad, settings.task))
    assert bad == BadRows()
    return found


def bad_rows(settings: Config) -> BadRows:
    bad = BadRows()
    list(read_interactions(settings.data, bad, settings.task))
    return bad


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[[Config], Dataset]:
    return lambda settings: prepare(settings, tmp_path / "data.sqlite", count_words)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    result = change(value)
    path.write_text(json.dumps(value if result is None else result), encoding="utf-8")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["user", "time"])
def test_official_files_become_histories_and_queries(tmp_path: Path, prepared: Any, task: str, split: str) -> None:
    folder = lamp_files.write_lamp(tmp_path / "files", task, split=split, ids=split == "time")
    with prepared(config(folder, task)) as data:
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
def test_oppu_s_files_name_the_targets(tmp_path: Path, prepared: Any, task: str, layout: str) -> None:
    folder = lamp_files.write_oppu(tmp_path / "files", task, users=101, others=2)
    with prepared(config(folder, task, "oppu", data={"layout": layout})) as data:
        targets = {user.id: user for user in data.users("target")}
        assert set(targets) == {str(number) for number in range(101)}
        assert {(user.history, user.queries) for user in targets.values()} == {(6, 2)}
        assert leaks(data) == []


@pytest.mark.parametrize("task", TASKS)
def test_what_oppu_s_others_were_asked_is_their_history(tmp_path: Path, prepared: Any, task: str) -> None:
    folder = lamp_files.write_oppu(tmp_path / "files", task)
    with prepared(config(folder, task, "oppu")) as data:
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


# Users and ids


def test_one_profile_is_one_user_and_another_profile_another(tmp_path: Path) -> None:
    folder = lamp_files.write_lamp(tmp_path, "lamp-3")

    def again(entries: Any) -> None:
        entries[1]["profile"] = entries[0]["profile"]
        entries[2]["profile"] = entries[0]["profile"][:-1]

    edit(folder / "dev_questions.json", again)
    asked = [row for row in rows(config(folder, "lamp-3")) if row.query]
    assert asked[0].user == asked[1].user
    assert len({row.user for row in asked}) == 3


def test_ids_that_users_share_mean_different_items(tmp_path: Path, prepared: Any) -> None:
    folder = lamp_files.write_oppu(tmp_path / "files", "lamp-4")
    # Every profile has items 0 to 5, and user 0 a query "0": nothing of that is shared.
    edit(folder / "user_top_100_history.json", lambda e: e[0]["query"][0].update(id="0"))
    with prepared(config(folder, "lamp-4", "oppu", split={"shared_items": "exclude"})) as data:
        assert summarize(data).unused == {}
        items = [row.item for user in data.users() for row in data.history(user.id)]
        assert len(items) == len(set(items))


def test_queries_with_one_text_and_two_ids_are_both_asked(tmp_path: Path, prepared: Any) -> None:
    folder = lamp_files.write_oppu(tmp_path / "files", "lamp-3")

    def repeat(entries: Any) -> None:
        entries[0]["query"].append(entries[0]["query"][0] | {"id": "again"})

    edit(folder / "user_top_100_history.json", repeat)
    with prepared(config(folder, "lamp-3", "oppu")) as data:
        assert sorted(query.item for query in data.queries("0")) == ["00", "01", "again"]


def test_a_query_in_its_own_user_s_profile_is_kept_out(tmp_path: Path, prepared: Any) -> None:
    folder = lamp_files.write_oppu(tmp_path / "files", "lamp-3")

    def plant(entries: Any) -> None:
        text = entries[0]["query"][0]["input"].partition("review: ")[2]
        for entry in entries[:2]:
            entry["profile"].append({"id": "x", "text": text, "score": "3", "date": 2001})

    edit(folder / "user_top_100_history.json", plant)
    with prepared(config(folder, "lamp-3", "oppu")) as data:
        # Somebody else's review of the same words is theirs.
        assert summarize(data).unused == {"asks what a query of the same user asks": 1}
        assert [len(data.history(user)) for user in ("0", "1", "2")] == [6, 7, 6]


def test_a_stranger_who_may_be_the_same_person_never_trains_on_a_query(tmp_path: Path, prepared: Any) -> None:
    """Without user ids, leaving one out makes two profiles of a person, each with the other's answer."""
    folder = lamp_files.write_lamp(tmp_path / "files", "lamp-3")
    asked = json.loads((folder / "dev_questions.json").read_text())[0]["input"]

    def plant(entries: Any) -> None:
        entries[1]["profile"].append({"id": "x", "text": asked.partition("review: ")[2], "score": "3"})

    edit(folder / "dev_questions.json", plant)
    with prepared(config(folder, "lamp-3")) as data:
        assert summarize(data).unused == {"shares an item or input with a query": 1}
        assert leaks(data) == []


def test_questions_of_users_who_are_no_targets_are_not_trained_on(tmp_path: Path, prepared: Any) -> None:
    folder = lamp_files.write_lamp(tmp_path / "files", "lamp-2m")
    with prepared(config(folder, "lamp-2m", split={"target_users": 1})) as data:
        assert summarize(data).unused == {"question of a user who is no target": 3}
        assert summarize(data).split_by == "the files"


def test_validation_is_cut_from_the_histories(tmp_path: Path, prepared: Any) -> None:
    folder = lamp_files.write_oppu(tmp_path / "files", "lamp-3")
    with prepared(config(folder, "lamp-3", "oppu", split={"evaluate_on": "validation", "queries": 0.3})) as data:
        queries: list[TextExample] = [*data.queries()]
        assert Counter(query.user for query in queries) == {"0": 2, "1": 2, "2": 2}
        assert {query.item.split("/")[0] for query in queries if query.item} == {"0", "1", "2"}
        assert summarize(data).unused == {"query, kept away from validation": 6}


# Values


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


# What is wrong is said


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


# The config


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


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(entries: int) -> int:
        path = tmp_path / f"{entries}.json"
        with path.open("w") as file:
            file.write("[" + ", ".join(json.dumps({"id": n, "text": "x" * 1000}) for n in range(entries)) + "]")
        tracemalloc.start()
        try:
            assert sum(1 for _ in json_entries(path)) == entries
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(8000) < 1.5 * peak(500)
