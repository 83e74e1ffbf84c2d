"""A user whose data a stage is being trained on is not deleted."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from proper.adapters.store import AdapterStore
from proper.data.database import create, get_meta
from proper.errors import InputError
from proper.interactions.deletion import remove
from proper.interactions.log import InteractionLog, LogEntry
from proper.interactions.personal_files import remove_rows


def test_while_a_stage_is_trained_its_users_stay(tmp_path: Path) -> None:
    run, user = tmp_path / "run", "ann"
    data = create(_made(run / "data.sqlite"))
    data.execute("INSERT INTO users (number, id) VALUES (1, 'ann')")
    data.execute("INSERT INTO texts (id, prompt, target) VALUES (1, 'x', 'y')")
    data.execute("INSERT INTO rows (id, text, user, tokens, digest, prompt_key) VALUES (1, 1, 1, 2, x'00', 0)")
    data.close()
    (run / "users" / "work").mkdir(parents=True)
    with closing(AdapterStore(run / "users")) as store, closing(InteractionLog(run / "users")) as log:
        with pytest.raises(InputError, match="a stage is being trained and holds user 'ann'"):
            remove(store, log, user)
        log.append("", "bo", [LogEntry("x", "y")])
        assert remove(store, log, "bo").found


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    return path


@pytest.mark.parametrize("value", ["{torn", "[1]", '{"first": ["secret"]}'])
def test_a_damaged_list_of_bad_rows_is_emptied_with_the_user(tmp_path: Path, value: str) -> None:
    path = tmp_path / "data.sqlite"
    data = create(path)
    data.execute("INSERT INTO users (number, id) VALUES (1, 'ann')")
    data.execute("INSERT INTO meta (key, value) VALUES ('bad_rows', ?)", (value,))
    data.close()
    remove_rows(path, ["ann"])
    with closing(sqlite3.connect(path)) as found:
        assert get_meta(found, "bad_rows") == {"count": 0, "first": []}
        assert not found.execute("SELECT 1 FROM users").fetchall()
