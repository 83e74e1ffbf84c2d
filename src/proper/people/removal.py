"""Deleting a person: from the log, the store and every other file of the run that holds something of theirs.

Knows the order of things, not what the files look like.
"""

from __future__ import annotations

from proper.adapters.store import AdapterStore
from proper.people.log import InteractionLog


def remove(store: AdapterStore, log: InteractionLog, user: str) -> bool:
    """Remove all of a user of the store's tenant; return whether there was anything.

    The log's transaction ends last: a kill before that leaves a user who can be deleted again, and none comes back.

    Raises:
        StoreError: a file cannot be written.
    """
    with log.deleting(store.tenant, user) as logged:
        stored = store.delete(user)
    return logged or stored
