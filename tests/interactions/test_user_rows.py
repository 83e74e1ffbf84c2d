"""A user's rows as people get them: in summaries, archives and descriptions of groups."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

from proper.config import make_config
from proper.data.chat import TURN
from proper.data.dataset import prepare
from proper.interactions.log import InteractionLog
from proper.interactions.parsing import record_reader
from proper.interactions.personal_extracts import from_data
from proper.interactions.user_rows import logged_rows, run_rows
from proper.reports.group_summary import group_summary

SHOWN = "System: Be brief.\nUser: Is the tram late?\nAssistant:"


def conversation(at: int) -> dict[str, object]:
    turns = [("system", "Be brief."), ("user", "Is the tram late?"), ("assistant", f"By {at} minutes.")]
    return {"user_id": "ann", "timestamp": at, "messages": [{"role": role, "content": text} for role, text in turns]}


def test_prompts_of_conversations_have_no_marks_of_messages(tmp_path: Path) -> None:
    path, data = tmp_path / "chats.jsonl", tmp_path / "data.sqlite"
    path.write_text("".join(json.dumps(conversation(at)) + "\n" for at in range(4)))
    config = make_config({"data": {"path": str(path)}, "split": {"min_history": 2, "shared_items": "allow"}})
    with prepare(config, data, lambda prompts, targets: [1] * len(prompts)) as dataset:
        assert all(row.prompt.count(TURN) == 3 for row in dataset.history("ann"))
    assert {row["prompt"] for row in run_rows(tmp_path, "ann")} == {SHOWN}
    assert {row["prompt"] for row in from_data(data, "ann")} == {SHOWN}
    (tmp_path / "routing.json").write_text(
        json.dumps({"utilization": [1.0], "users": [{"user": "ann", "main": 0, "gates": [1.0]}]})
    )
    assert [row["prompt"] for row in group_summary(tmp_path)[0]["examples"]] == [SHOWN]
    with closing(InteractionLog(tmp_path / "users")) as log:
        log.append("", "ann", [record_reader(config.data, config.task, "ann")(conversation(9))])
        assert [row["prompt"] for row in logged_rows(log, "", "ann")] == [SHOWN]
        assert [row.prompt.count(TURN) for row in log.interactions("", "ann")] == [3]
