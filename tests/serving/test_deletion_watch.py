"""The thread that looks for deletions survives a store that cannot be opened when the server starts."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from proper.adapters.store import AdapterStore
from proper.errors import StoreError
from proper.serving import deletion_watch


def test_a_store_that_opens_late_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, tries, lines = threading.Event(), list[Path](), list[str]()

    def opened(users: Path) -> AdapterStore:
        tries.append(users)
        if len(tries) == 1:
            raise StoreError("the database is starting up")
        return AdapterStore(users)

    monkeypatch.setattr(deletion_watch, "AdapterStore", opened)
    monkeypatch.setattr(deletion_watch, "PERIOD", 0.01)
    engine = cast(Any, SimpleNamespace(recheck=looked.set))
    watch = deletion_watch.DeletionWatch(engine, tmp_path / "users", lines.append)
    watch.start()
    try:
        assert looked.wait(10)
    finally:
        watch.stop()
    assert len(lines) == 1 and lines[0].endswith("the database is starting up")
