"""Users' versions across refreshes of the groups: which of them was made for the groups before the last refresh."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from proper.adapters.records import MADE
from proper.adapters.store import AdapterStore, UserRecord, Version
from proper.run_folder import Tier

BY = "refresh"
"""`made.by` of a version that a refresh made."""


def versions_before(store: AdapterStore, seen: dict[str, int]) -> Iterator[UserRecord]:
    """Yield every user's version for the groups before the last refresh, as a new one.

    `seen` takes the numbers of the users' current versions.
    """
    for user, _ in store.users():
        versions = store.versions(user)
        if versions:  # else the user was deleted meanwhile
            seen[user] = versions[0].version
            record = _before(store, user, versions)
            if record is not None:
                yield record


def _before(store: AdapterStore, user: str, versions: Sequence[Version]) -> UserRecord | None:
    """Return a user's version for the groups before; None for a user who was deleted meanwhile."""
    found: Version | None = versions[0]
    made: dict[str, Any] = {"by": "rollback", "instead_of": versions[0].version}
    while found is not None and found.metadata.get(MADE, {}).get("by") == BY:
        of = found.metadata[MADE]["of"]
        found = next((each for each in versions if each.version == of), None)
    # Otherwise an update has been trained on the refreshed groups, or the version is no longer kept.
    record = store.get(user, versions[0].version if found is None else found.version, coded=True)
    if record is None:
        return None
    if found is None or found is versions[0]:
        made = {"by": BY, "of": versions[0].version, "refit": record.adapter is not None}
        record = UserRecord(user, Tier.GROUPS, record.embedding, None, record.metadata)
    else:
        made["of"] = found.version
    return replace(record, metadata={**record.metadata, MADE: made, "reason": "went back to the groups before"})
