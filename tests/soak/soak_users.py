"""Users of the soak test: each is fitted to answer with a code word; and the expected answers, computed offline.

The run is copied first. Settings of stage 3 are changed so that a fit of a few seconds learns the word; other settings
are not changed. Independent of servers.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from proper.adapters.store import AdapterStore, UserRecord
from proper.enrolment.fit_user import open_fitter
from proper.enrolment.worker import FitWorker
from proper.errors import StoreError
from proper.inference import load
from proper.inference.generate import generate
from proper.interactions.log import InteractionLog, LogEntry

PROMPT = "What is your code word?"
WORDS = ("father", "table", "water", "stone", "house", "level")
"""Code words of the users who exist from the beginning, one token each."""
GUESTS = ("river", "garden", "silver", "winter", "candle", "forest", "bridge", "island", "market", "window", "yellow")
LENGTHS = (2, 7, 20)
"""Tokens that answers are asked for."""
TEACHING: dict[str, Any] = {
    "users": {"epochs": 30, "learning_rate": 0.06, "schedule": "constant", "max_items": 6, "tiers": {"select": False}},
    # A new user's embedding is fitted in as many passes.
    "groups": {"epochs": 1},
}


def name_of(word: str) -> str:
    """The user whose code word this is."""
    return f"the-{word}-user"


def target(word: str) -> str:
    """The training answer of a user: the word, repeated more often than any request asks for."""
    return " ".join([word] * (max(LENGTHS) + 4))


def labels_of(run: Path) -> list[str]:
    """Return the labels that a run's task answers with; none where it writes text."""
    raw = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    return list(raw.get("task", {}).get("labels") or ())


def prepare(run: Path, folder: Path) -> dict[str, str]:
    """Copy a run to `folder` and teach its new users; return their words by user."""
    shutil.copytree(run, folder)
    raw = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    for section, change in TEACHING.items():
        raw[section] = {**raw.get(section, {}), **change}
    (folder / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    words = {name_of(word): word for word in WORDS}
    with closing(InteractionLog(folder / "users")) as log, closing(open_fitter(folder, load(folder))) as fitter:
        for user, word in words.items():
            log.append("", user, [LogEntry(PROMPT, target(word), id=f"first-{at}") for at in range(2)])
        desk = FitWorker(folder / "users", log, lambda: fitter)
        while desk.fit_next():
            pass
    return words


def says(text: str, word: str) -> bool:
    """Whether a text is a prefix of this user's training answer, and has the word at least once."""
    return text.startswith(word) and target(word).startswith(text)


class Archive:
    """Every version of every user that was ever in the store, for the offline model to answer with.

    Attributes:
        records: by user and version, as they are stored.
    """

    def __init__(self, users: Path) -> None:
        self._store = AdapterStore(users)
        self.records: dict[tuple[str, int], UserRecord] = {}

    def look(self) -> None:
        """Keep what is new; a version whose bytes are damaged just now is kept the next time.

        The store keeps the version before the current one, so that two may land between two looks.
        """
        for user, head, _ in list(self._store.heads()):
            if (user, head.version) in self.records:
                continue
            for held in self._store.versions(user):
                with suppress(StoreError):
                    record = self._store.get(user, held.version, coded=True)
                    if record is not None:
                        self.records.setdefault((user, held.version), record)

    def close(self) -> None:
        """Close the store."""
        self._store.close()


Asked = tuple[str | None, int | None, str, int]
"""User, version, the tier that answered, and tokens."""


def offline(
    run: Path, folder: Path, records: dict[tuple[str, int], UserRecord], asked: Iterable[Asked]
) -> dict[Asked, str]:
    """Return what `generate` answers in a process of its own, without a server.

    Args:
        run: as `prepare` has left it.
        folder: where a copy of it may be made.
        records: the versions, each of which becomes a user of that copy, once as it is and once without its adapter.
        asked: what to answer.
    """
    shutil.copytree(run, folder)
    wanted = sorted(set(asked), key=lambda one: (one[3], str(one)))
    with closing(AdapterStore(folder / "users")) as store:
        named = {(user, version, tier) for user, version, tier, _ in wanted if user is not None and version is not None}
        store.put(_as(records[user, version], version, tier) for user, version, tier in sorted(named))
    found: dict[Asked, str] = {}
    with closing(load(folder)) as model:
        for length in LENGTHS:
            these = [one for one in wanted if one[3] == length]
            texts = generate(model, [PROMPT] * len(these), _users(these), max_new_tokens=length) if these else []
            found |= dict(zip(these, texts, strict=True))
    return found


def _as(record: UserRecord, version: int, tier: str) -> UserRecord:
    name = f"{record.user}@{version}:{tier}"
    if tier == "groups":
        return replace(record, user=name, tier="groups", adapter=None)
    return replace(record, user=name)


def _users(asked: Sequence[Asked]) -> list[str | None]:
    return [None if user is None or version is None else f"{user}@{version}:{tier}" for user, version, tier, _ in asked]
