"""What each group is: the words and labels of planted groups come first, and the log-odds are those of the paper."""

from __future__ import annotations

import json
import math
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proper.cli.app import main
from proper.data.database import create, set_meta
from proper.data.dataset import VERSION
from proper.errors import InputError, RunFolderError
from proper.reports.group_summary import PRIOR, group_summary, log_odds

TOPICS = ("sailing on the harbour", "baking bread at home")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Eight users of two groups, one of whom has a word of their own in every item."""
    (tmp_path / "config.yaml").write_text("data: {path: x}\n")
    users = []
    with closing(create(tmp_path / "data.sqlite")) as data:
        for key, value in {"version": VERSION, "sha256": "x", "labels": ["sport", "food"], "split_by": "time"}.items():
            set_meta(data, key, value)
        row = 0
        for number in range(8):
            group, user = number % 2, f"u{number}"
            gates = [0.7 - number / 100, 0.3 + number / 100]
            users.append({"user": user, "main": group, "gates": gates if group == 0 else gates[::-1]})
            data.execute("INSERT INTO users (number, id) VALUES (?, ?)", (number, user))
            for item in range(20):
                row += 1
                own = "zyzzyva" if number == 0 else ""
                text = f"Text {item}: {TOPICS[group] if item % 2 else 'nothing much'} {own}\nLabel:"
                data.execute("INSERT INTO texts VALUES (?, ?, ?, NULL)", (row, text, ("sport", "food")[group]))
                part = "query" if item == 19 else "history"
                values = (row, row, number, float(row), part)
                data.execute("INSERT INTO rows VALUES (?, ?, ?, ?, 2, x'00', NULL, 0, ?, NULL)", values)
    (tmp_path / "routing.json").write_text(json.dumps({"utilization": [0.52, 0.48], "users": users}))
    return tmp_path


def test_a_group_is_told_by_what_its_users_write(run: Path) -> None:
    first, second = group_summary(run)
    assert (first["group"], first["users"], first["utilization"]) == (0, 4, 0.52)
    assert [row["user"] for row in first["typical"]][:2] == ["u0", "u2"]
    assert {row["text"] for row in first["words"]} == {"sailing", "on", "the", "harbour"}
    assert {row["text"] for row in second["words"]} == {"baking", "bread", "at", "home"}
    assert [row["text"] for row in first["labels"]] == ["sport"] and first["labels"][0]["of"] == 4 * 19
    assert "sailing" in first["examples"][0]["prompt"] and first["examples"][0]["user"] == "u0"
    assert group_summary(run, 1) == [second]
    with pytest.raises(InputError, match="groups 0 to 1"):
        group_summary(run, 2)


def test_the_command_prints_words_or_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["groups", "show", str(run), "--group", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "group 0: 52 % of the mean gate; main group of 4 users"
    assert lines[3].startswith("  overrepresented labels, against other users: sport (z ")
    assert main(["groups", "show", str(run), "--json"]) == 0
    assert [json.loads(line)["group"] for line in capsys.readouterr().out.splitlines()] == [0, 1]


@pytest.mark.parametrize("value", [-1, "x", None, {}])
def test_utilization_that_is_no_list_is_a_run_without_groups(run: Path, value: object) -> None:
    path = run / "routing.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "utilization": value}))
    assert group_summary(run) == []


def test_a_run_without_routing_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="proper evaluate"):
        group_summary(tmp_path)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_log_odds_are_those_of_the_paper(having: int, more: int, others: int, others_more: int) -> None:
    """Equations 15, 16 and 22 of Monroe et al., written out, with the variance of all four cells."""
    of, others_of = having + more, others + others_more
    z = log_odds(having, of, others, others_of)
    if not of or not others_of:
        assert z == 0
        return
    rate = (having + others + 0.5) / (of + others_of + 1)
    alpha, alpha_0 = PRIOR * rate, PRIOR
    delta = math.log((having + alpha) / (of + alpha_0 - having - alpha))
    delta -= math.log((others + alpha) / (others_of + alpha_0 - others - alpha))
    variance = sum(1 / (n + alpha) for n in (having, others)) + sum(
        1 / (n + alpha_0 - alpha) for n in (more, others_more)
    )
    assert z == pytest.approx(delta / math.sqrt(variance))
    assert log_odds(others, others_of, having, of) == pytest.approx(-z)


def test_what_every_item_has_is_not_raised_by_a_large_group() -> None:
    """A word of the template: both rates are 1, and the sets differ in size."""
    assert abs(log_odds(5000, 5000, 50, 50)) < 1
    assert log_odds(40, 100, 10, 100) > 3
