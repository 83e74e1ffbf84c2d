"""Other ways to see a data set: one user, and a history that holds those of the users before."""

from __future__ import annotations

from proper.data.derived.views import SINGLE_USER, Leaking, OneUser


def rows():
    return [
        {"user_id": user, "timestamp": at, "input": f"{user} {at}", "output": f"answer {at % 3}"}
        for user, size in {"a": 20, "b": 15, "c": 3}.items()
        for at in range(size)
    ]


def test_one_user_has_the_same_rows_in_the_same_order(build) -> None:
    dataset = build(rows())
    view = OneUser(dataset)
    mine, theirs = view.sample("all", 60, 3, "rows"), dataset.sample("all", 60, 3, "rows")
    assert (mine.size, mine.tokens) == (theirs.size, theirs.tokens)
    for epoch in (0, 1):
        pairs = list(zip(mine.rows(epoch), theirs.rows(epoch), strict=True))
        assert all(one.user == SINGLE_USER and one.id == other.id for one, other in pairs)
    assert [(user.id, user.history) for user in view.users()] == [
        (SINGLE_USER, sum(u.history for u in dataset.users()))
    ]


def test_a_leaking_history_holds_those_of_the_targets_before(build) -> None:
    dataset = build(rows())
    view = Leaking(dataset, 5)
    first, second = [user.id for user in dataset.users("target")]
    assert view.history(first, 5) == dataset.history(first, 5)
    assert view.history(second, 5) == [*dataset.history(first, 5), *dataset.history(second, 5)]
