"""The data and configs of the comparison of one run over two tasks with one run per task."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from experiments.tasks import APART, SETS, configs, newest_rows
from proper.methods.table import known_methods


def test_the_newest_rows_of_the_users_with_the_most_in_the_order_of_time(tmp_path: Path) -> None:
    table = [
        {"user_id": f"u{user}", "item_id": f"i{at}", "timestamp": f"2020-01-{at + 1:02}", "text": f"t{at}" * (at != 4)}
        for user in range(3)
        for at in range(5 + user)
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet")
    newest_rows(tmp_path / "rows.parquet", tmp_path / "rows.jsonl", users=2, items=3)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["user_id"]: 0 for row in rows} == {"u1": 0, "u2": 0}
    own = [row for row in rows if row["user_id"] == "u2"]
    assert [row["text"] for row in own] == ["t3", "t5", "t6"]  # the row without a text is left out
    assert [row["timestamp"] for row in own] == sorted(row["timestamp"] for row in own)
    assert len({row["timestamp"] for row in rows}) == len(rows)


def test_the_joint_run_has_the_budget_of_both_tasks(tmp_path: Path) -> None:
    for name, (_, tasks) in SETS.items():
        made = configs(tmp_path / "rows.jsonl", name, users=30, items=20, tokens=1000)
        joint = made.pop("joint")
        assert list(joint.tasks) == list(made) == list(tasks)
        for task, alone in made.items():
            assert joint.each_task[task].data == alone.data and joint.each_task[task].task == alone.task
            assert joint.groups.max_tokens == 2 * (alone.groups.max_tokens or 0)
            assert (joint.users.max_items, joint.users.steps) == (2 * 10, 2 * 8)
            assert joint.split == alone.split
        assert known_methods([f"users{APART}"], joint)
