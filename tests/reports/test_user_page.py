"""The page of one user: from a store of real records, with ids that are no file names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proper.adapters.store import AdapterStore, UserRecord
from proper.errors import InputError
from proper.reports.formats import safe_name
from proper.reports.load import load_run
from proper.reports.user_data import load_user
from proper.reports.user_page import write_user_pages

PageOf = Callable[[Path, str], Any]


def named(index: int, hostile: list[str]) -> str:
    return hostile[index - 3] if 3 <= index <= 5 else f"u{index}"


@pytest.fixture
def page_of(parse: Callable[[Path], Any]) -> PageOf:
    """Write a user's page and parse it."""
    return lambda folder, user: parse(write_user_pages(folder, [user])[0])


@pytest.fixture
def stocked(folder: Path, hostile_ids: list[str]) -> Path:
    """The run with a store: embeddings around a circle, and an adapter for `u1` with its reason."""
    store = AdapterStore(folder / "users")
    angles = [2 * torch.pi * index / 60 for index in range(60)]
    vectors = [torch.tensor([torch.cos(torch.tensor(a)), torch.sin(torch.tensor(a))]) for a in angles]
    store.put(UserRecord(named(index, hostile_ids), "groups", vector) for index, vector in enumerate(vectors))
    facts = {"items": 8, "passes": 2, "group_loss": 1.5, "user_loss": 1.25, "held_losses": [1.4, 1.3],
             "reason": "the adapter lowers the held-out loss", "pooled": True}  # fmt: skip
    store.put([UserRecord("u1", "users", vectors[1], {"m.A": torch.ones(1, 2, 3)}, facts)])
    store.put([UserRecord("u2", "groups", vectors[2], None, {"group_loss": 0.5})])
    store.close()
    losses = {"history_losses": {"key": "k", "value": {"u1": 0.25, "u2": 0.75}}}
    (folder / "analysis.json").write_text(json.dumps(losses))
    return folder


def test_the_page_tells_everything_of_one_user(stocked: Path, page_of: PageOf) -> None:
    page = page_of(stocked, "u1")
    assert not page.open
    assert "User u1" in page.text["header"] and "10history, items" in page.text["header"]
    served = page.text["served"]
    assert "Reason: the adapter lowers the held-out loss, decided together with the nearest users" in served
    assert "newest 8 of 10 items" in served and "2 epochs" in served
    for row in (
        "held-out history, group model1.5001.000",
        "held-out history, with the adapter1.2501.250",
        "newest items of the history, trained on0.2500.500",
        "held-out history after each pass1.400, 1.300",
    ):
        assert row in served
    assert "queries, users1.250" in served
    # Everybody and this user once in each of two strips; one user has no gain by the group model.
    assert len(page.tips["gain"]) == 60 + 59 + 2
    assert len(page.tips["gates"]) == page.count("g", class_="name") == 5
    near = page.text["near"]
    assert "u00.995" in near and "u20.995" in near and near.count("0.995") == 2
    assert page.text["queries"].count("reference") == 5 and "All 5" in page.text["queries"]
    assert "21Users" in page.text["versions"] and "1–Groups" in page.text["versions"]


def test_of_several_tasks_the_page_has_the_scores_of_the_first(
    stocked: Path, page_of: PageOf, change: Callable[[Callable[[dict[str, Any]], None]], None]
) -> None:
    def edit(results: dict[str, Any]) -> None:
        results["metrics"] += [{**row, "task": "letters", "value_users": 0.111} for row in results["metrics"]]
        results["tasks"] = [{"name": "notes", "kind": "classification"}, {"name": "letters", "kind": "classification"}]

    change(edit)
    for path in (stocked / "predictions").iterdir():
        rows = [{**json.loads(line), "task": "notes"} for line in path.read_text().splitlines()]
        more = [{**row, "id": row["id"] + 300, "task": "letters", "loss": 9.0} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
    page = page_of(stocked, "u1")
    assert "Users0.4600.641" in page.text["gain"] and "0.111" not in page.text["gain"]
    assert "queries, users1.250" in page.text["served"] and "notes: Gain in accuracy" in page.text["header"]
    assert page.text["queries"].count("reference") == 10
    assert "newest 8 of" not in page.text["served"], "stage 3 chooses from the rows of all tasks"
    users = json.loads((stocked / "users.json").read_text())
    users["users"] = [row for row in users["users"] if row["user"] != "u1"]
    (stocked / "users.json").write_text(json.dumps(users))
    assert "The task notes has no queries of this user." in page_of(stocked, "u1").text["header"]


def test_a_version_of_an_update_is_not_said_to_be_of_stage_3(stocked: Path, page_of: PageOf) -> None:
    store = AdapterStore(stocked / "users")
    facts = {"items": 8, "history": {"run": 10, "logged": 2}, "reason": "loss 2.1 -> 2.0"}
    store.put([UserRecord("u1", "users", torch.ones(2), {"m.A": torch.ones(1, 2, 3)}, facts)])
    store.close()
    served = page_of(stocked, "u1").text["served"]
    assert "Reason: loss 2.1 -> 2.0." in served and "Stage 3" not in served


def test_neighbours_are_the_largest_cosines(stocked: Path) -> None:
    person = load_user(load_run(stocked), "u30")
    # Both sides of the circle are equally near.
    near = [near.user for near in person.stored.neighbours]
    pairs = [set(near[at : at + 2]) for at in range(0, 8, 2)]
    assert pairs == [{f"u{30 - step}", f"u{30 + step}"} for step in (1, 2, 3, 4)]
    cosines = [near.cosine for near in person.stored.neighbours]
    assert cosines == sorted(cosines, reverse=True) and person.stored.typical == pytest.approx(0, abs=0.2)


def test_hostile_ids_are_text_in_the_page_and_safe_in_the_file_system(
    stocked: Path, hostile_ids: list[str], parse: Callable[[Path], Any]
) -> None:
    paths = write_user_pages(stocked, hostile_ids)
    assert len(set(paths)) == 3
    for user, path in zip(hostile_ids, paths, strict=True):
        assert path.parent == stocked and path.name.startswith("report-user-") and path.name.isascii()
        page = parse(path)
        assert f"User {user}" in page.text["header"]
        assert page.count("img") == 0 and page.count("script") == 1


def test_a_user_of_whom_little_is_known_still_has_a_page(stocked: Path, page_of: PageOf) -> None:
    store = AdapterStore(stocked / "users")
    store.put([UserRecord("stranger", "groups", torch.ones(2))])
    store.delete("u6")
    store.close()
    text = page_of(stocked, "stranger").text
    assert "Not a target user" in text["header"]
    assert "Not available" in text["gates"] and "Not available" in text["queries"]
    assert "has no record of this user" in page_of(stocked, "u6").text["served"]


def test_a_run_without_a_store_still_has_pages(folder: Path, page_of: PageOf) -> None:
    text = page_of(folder, "u1").text
    assert "the run has no adapter store" in text["served"] and text["queries"].count("reference") == 5


def test_an_unknown_user_is_named_and_nothing_is_written(stocked: Path) -> None:
    with pytest.raises(InputError, match="--user 'u1O': no such user in .*; did you mean 'u1"):
        write_user_pages(stocked, ["u1", "u1O"])
    assert not list(stocked.glob("report-user-*"))


@given(st.lists(st.text(), min_size=2, max_size=2, unique=True))
def test_names_are_safe_and_differ_even_where_case_does_not_count(texts: list[str]) -> None:
    names = [safe_name(text) for text in texts]
    assert names[0].casefold() != names[1].casefold()
    for name in names:
        assert name.isascii() and len(name) <= 40 and not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789-_")


def test_plain_ids_are_their_own_names() -> None:
    assert [safe_name(text) for text in ("u0001", "a_b-c")] == ["u0001", "a_b-c"]
    assert safe_name("Ann") != safe_name("ann") == "ann" and safe_name("../x").startswith("x--")
