"""The summary of a user: how each version was made, from which items, and what it says in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proper.adapters.store import AdapterStore, UserRecord
from proper.data.database import create
from proper.interactions.log import InteractionLog, LogEntry
from proper.reports.user_summary import gate_words, user_summary
from proper.reports.user_words import ranges, user_words

TRIAL = {"items": 3, "group_loss": 1.25, "user_loss": 0.5, "held_out": 2, "up": True, "reason": "it helps"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with three history rows and a query of `ann`."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("data: {path: x}\nusers: {max_items: 4}\n")
    with closing(create(folder / "data.sqlite")) as data:
        data.execute("INSERT INTO users (number, id) VALUES (1, 'ann'), (2, 'bo')")
        for row, (user, part) in enumerate(
            [(1, "history"), (2, "history"), (1, "history"), (1, "history"), (1, "query")]
        ):
            data.execute("INSERT INTO texts VALUES (?, ?, 'y', ?)", (row, f"text {row}", f"item-{row}"))
            values = (row + 1, row, user, 100.0 + row, part)
            data.execute("INSERT INTO rows VALUES (?, ?, ?, ?, 2, x'00', NULL, 0, ?, NULL)", values)
    return folder


@pytest.fixture
def store(run: Path) -> Iterator[AdapterStore]:
    with closing(AdapterStore(run / "users", keep=9)) as opened:
        yield opened


@pytest.fixture
def log(run: Path) -> Iterator[InteractionLog]:
    with closing(InteractionLog(run / "users")) as opened:
        yield opened


def record(tier: str, facts: dict[str, object]) -> UserRecord:
    adapter = {"x.A": torch.ones(2, 3)} if tier == "users" else None
    return UserRecord("ann", tier, torch.ones(4), adapter, facts)


def test_every_version_says_how_it_was_made_and_from_what(run: Path, store: AdapterStore, log: InteractionLog) -> None:
    store.put([record("groups", {})])
    store.put([record("users", TRIAL)])
    log.append("", "ann", [LogEntry("old", "z", 1.0, "a"), LogEntry("new", "z", 999.0, "b")])
    store.put([record("users", TRIAL | {"history": {"run": 3, "logged": 2}, "up": False, "reason": "it does not"})])
    log.append("", "ann", [LogEntry("newer", "z", 1000.0, "c")])
    store.rollback("ann", 2)
    found = user_summary(run, store, log, "ann")
    rollback, update, stage3, stage2 = found["versions"]
    assert [each["made"]["by"] for each in found["versions"]] == ["rollback", "update", "stage 3", "stage 2"]
    assert stage2["from"] == {"rows": [1, 3, 4], "items": ["item-0", "item-2", "item-3"], "logged": []}
    assert stage3["from"] == rollback["from"] == stage2["from"]
    # Of five items the newest four, by time; "c" came after the fit.
    assert update["from"] == {"rows": [1, 3, 4], "items": ["item-0", "item-2", "item-3"], "logged": ["b"]}
    assert (update["made"]["promoted"], update["made"]["why"]) == (False, "it does not")
    assert stage3["made"]["losses"] == {"group": 1.25, "user": 0.5, "held_out": 2}
    assert {key: rollback["made"][key] for key in ("of", "instead_of", "written")} == {
        "of": 2,
        "instead_of": 3,
        "written": stage3["written"],
    }
    assert found["gain"]["held_out"]["gain"] == 0.75 and found["gain"]["queries"] is None
    assert found["interactions"] == {"history": 3, "query": 1, "unused": 0, "logged": 3}
    assert "text 0" not in json.dumps(found)
    assert [row["prompt"] for row in user_summary(run, store, log, "ann", texts=True)["texts"]][-1] == "newer"
    lines = list(user_words(found))
    assert "    made by a rollback: went back to version 2 from version 3" in lines
    assert "    promoted to an adapter: held-out loss 1.250 with groups, .500 with the adapter" in lines
    assert "    from 4 items: rows 1, 3-4 of the run's data; logged b" in lines


def test_a_rollback_of_a_rollback_names_the_first_writing(store: AdapterStore) -> None:
    store.put([record("groups", {"made": {"by": "import", "exported_as": "eve"}})])
    store.put([record("users", TRIAL)])
    first = store.versions("ann")[1].written
    for _ in range(3):
        store.rollback("ann")
    made = store.versions("ann")[0].metadata["made"]
    assert made == {
        "by": "rollback",
        "of": 3,
        "instead_of": 4,
        "written": first,
        "before": {"by": "import", "exported_as": "eve"},
    }


def test_gates_and_scores_are_those_of_the_evaluation(run: Path, store: AdapterStore) -> None:
    store.put([record("groups", {})])
    assert user_summary(run, store, None, "ann")["gates"] is None
    (run / "routing.json").write_text('{"users": [{"user": "ann", "gates": [0.2, 0.61, 0.19], "main": 1}]}')
    scores = {"user": "ann", "queries": 4, "values": {"groups": 0.25, "users": 0.5}, "gain_users": 0.25}
    (run / "users.json").write_text(json.dumps({"metric": "accuracy", "users": [scores]}))
    found = user_summary(run, store, None, "ann")
    assert found["gates"]["words"] == "mostly group 1 (.61), then group 0 (.20)"
    said = "accuracy on 4 queries in the last evaluation: .250 with groups, .500 with users"
    assert said in user_words(found)
    (run / "results.json").write_text(
        '{"run": {"seeds": [0, 1]}}'
    )  # no single seed, such as the served one, need have it
    assert f"{said}, means of 2 seeds" in user_words(user_summary(run, store, None, "ann"))


def test_gates_in_words() -> None:
    assert gate_words([1.0]) == "group 0, the only one"
    assert gate_words([0.26, 0.25, 0.25, 0.24]) == "all 4 groups about equally; most group 0 (.26)"
    assert gate_words([0.1, 0.4, 0.3, 0.2]) == "more than others group 1 (.40), then group 2 (.30)"


@given(st.sets(st.integers(0, 60)))
def test_ranges_name_exactly_the_numbers(numbers: set[int]) -> None:
    found = set[int]()
    for span in filter(None, ranges(sorted(numbers)).split(", ")):
        low, _, high = span.partition("-")
        found |= set(range(int(low), int(high or low) + 1))
    assert found == numbers
