"""LaMP's users and item ids, what of their histories is left out, and the memory that reading takes."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

from proper.data.checks import leaks
from proper.data.histories import TextExample
from proper.data.summary import summarize
from proper.data.text_files import json_entries
from tests import lamp_files
from tests.data.lamp_reading import config, edit, rows


def test_one_profile_is_one_user_and_another_profile_another(tmp_path: Path) -> None:
    folder = lamp_files.write_lamp(tmp_path, "lamp-3")

    def again(entries: Any) -> None:
        entries[1]["profile"] = entries[0]["profile"]
        entries[2]["profile"] = entries[0]["profile"][:-1]

    edit(folder / "dev_questions.json", again)
    asked = [row for row in rows(config(folder, "lamp-3")) if row.query]
    assert asked[0].user == asked[1].user
    assert len({row.user for row in asked}) == 3


def test_ids_that_users_share_mean_different_items(tmp_path: Path, prepare_run: Any) -> None:
    folder = lamp_files.write_oppu(tmp_path / "files", "lamp-4")
    # Every profile has items 0 to 5, and user 0 a query "0": nothing of that is shared.
    edit(folder / "user_top_100_history.json", lambda e: e[0]["query"][0].update(id="0"))
    with prepare_run(config(folder, "lamp-4", "oppu", split={"shared_items": "exclude"})) as data:
        assert summarize(data).unused == {}
        items = [row.item for user in data.users() for row in data.history(user.id)]
        assert len(items) == len(set(items))


def test_queries_with_one_text_and_two_ids_are_both_asked(tmp_path: Path, prepare_run: Any) -> None:
    folder = lamp_files.write_oppu(tmp_path / "files", "lamp-3")

    def repeat(entries: Any) -> None:
        entries[0]["query"].append(entries[0]["query"][0] | {"id": "again"})

    edit(folder / "user_top_100_history.json", repeat)
    with prepare_run(config(folder, "lamp-3", "oppu")) as data:
        assert sorted(query.item for query in data.queries("0")) == ["00", "01", "again"]


def test_a_query_in_its_own_user_s_profile_is_kept_out(tmp_path: Path, prepare_run: Any) -> None:
    folder = lamp_files.write_oppu(tmp_path / "files", "lamp-3")

    def plant(entries: Any) -> None:
        text = entries[0]["query"][0]["input"].partition("review: ")[2]
        for entry in entries[:2]:
            entry["profile"].append({"id": "x", "text": text, "score": "3", "date": 2001})

    edit(folder / "user_top_100_history.json", plant)
    with prepare_run(config(folder, "lamp-3", "oppu")) as data:
        # Somebody else's review of the same words is theirs.
        assert summarize(data).unused == {"asks what a query of the same user asks": 1}
        assert [len(data.history(user)) for user in ("0", "1", "2")] == [6, 7, 6]


def test_a_stranger_who_may_be_the_same_person_never_trains_on_a_query(tmp_path: Path, prepare_run: Any) -> None:
    """Without user ids, leaving one out makes two profiles of a person, each with the other's answer."""
    folder = lamp_files.write_lamp(tmp_path / "files", "lamp-3")
    asked = json.loads((folder / "dev_questions.json").read_text())[0]["input"]

    def plant(entries: Any) -> None:
        entries[1]["profile"].append({"id": "x", "text": asked.partition("review: ")[2], "score": "3"})

    edit(folder / "dev_questions.json", plant)
    with prepare_run(config(folder, "lamp-3")) as data:
        assert summarize(data).unused == {"shares an item or input with a query": 1}
        assert leaks(data) == []


def test_questions_of_users_who_are_no_targets_are_not_trained_on(tmp_path: Path, prepare_run: Any) -> None:
    folder = lamp_files.write_lamp(tmp_path / "files", "lamp-2m")
    with prepare_run(config(folder, "lamp-2m", split={"target_users": 1})) as data:
        assert summarize(data).unused == {"question of a user who is no target": 3}
        assert summarize(data).split_by == "the files"


def test_validation_is_cut_from_the_histories(tmp_path: Path, prepare_run: Any) -> None:
    folder = lamp_files.write_oppu(tmp_path / "files", "lamp-3")
    with prepare_run(config(folder, "lamp-3", "oppu", split={"evaluate_on": "validation", "queries": 0.3})) as data:
        queries: list[TextExample] = [*data.queries()]
        assert Counter(query.user for query in queries) == {"0": 2, "1": 2, "2": 2}
        assert {query.item.split("/")[0] for query in queries if query.item} == {"0", "1", "2"}
        assert summarize(data).unused == {"query, kept away from validation": 6}


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
