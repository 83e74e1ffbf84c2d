"""Queries whose items others had, and users whom a sample leaves out."""

from __future__ import annotations

from proper.data.summary import queries_seen_by_others, targets_outside


def test_seen_by_others_is_by_item_else_by_input(build) -> None:
    rows = [
        {"user_id": user, "timestamp": at, "input": f"{user} {at}", "output": "yes", "item_id": f"{user}{at}"}
        for user in ("a", "b")
        for at in range(12)
    ]
    rows[11]["item_id"] = "b1"  # a's query, an item in b's history
    rows[23]["item_id"] = "b2"  # b's query, an item in b's own history only
    dataset = build(rows, split={"shared_items": "allow", "queries": 0.05})
    queries = {query.user: query.id for query in dataset.queries()}
    assert queries_seen_by_others(dataset) == {queries["a"]}
    for row in rows:
        del row["item_id"]
    rows[11]["input"], rows[23]["input"] = "B  3", "b 2"
    dataset = build(rows, split={"shared_items": "allow", "queries": 0.05})
    queries = {query.user: query.id for query in dataset.queries()}
    assert queries_seen_by_others(dataset) == {queries["a"]}


def test_users_outside_a_sample(build) -> None:
    rows = [
        {"user_id": user, "timestamp": at, "input": f"{user} {at}", "output": "yes"}
        for user in ("a", "b", "c")
        for at in range(15)
    ]
    dataset = build(rows)
    assert targets_outside(dataset, dataset.sample("all", None, 0)) == set()
    sample = dataset.sample("all", 1, 0)
    (drawn,) = {row.user for row in sample.rows(0)}
    assert targets_outside(dataset, sample) == {"a", "b", "c"} - {drawn}
