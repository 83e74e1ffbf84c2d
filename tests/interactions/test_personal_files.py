"""A user whose data a stage is being trained on is not deleted."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from proper.adapters.store import AdapterStore
from proper.errors import InputError
from proper.interactions.deletion import remove
from proper.interactions.log import InteractionLog, LogEntry


def test_while_a_stage_is_trained_its_users_stay(tmp_path: Path) -> None:
    run, user = tmp_path / "run", "ann"
    from proper.data.database import create

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
