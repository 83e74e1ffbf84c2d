"""Tables of a run's databases, written once for SQLite and PostgreSQL.

`STORE` is the manifest of the adapter store, `LOG` the interaction log with the fit queue. Each is a file in SQLite; in
PostgreSQL both are in the run's schema. A user's id is stored as bytes (`manifest.key_of`), for every Python string.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Column, Double, Index, Integer, LargeBinary, MetaData, Table, Text, UniqueConstraint

STORE, LOG = MetaData(), MetaData()
# SQLite generates numbers only for columns of the type INTEGER.
_NUMBER = BigInteger().with_variant(Integer, "sqlite")
_TREE: dict[str, Any] = {"sqlite_with_rowid": False}


STORE_METADATA = Table(
    "facts", STORE, Column("key", Text, primary_key=True), Column("value", Text, nullable=False), **_TREE
)

# The tensor spec of an adapter's bytes, stored once for all users who share it.
LAYOUTS = Table("layouts", STORE, Column("id", _NUMBER, primary_key=True), Column("spec", Text, nullable=False))

# Committed size of each shard in bytes; shard numbers are never reused.
SHARDS = Table(
    "shards",
    STORE,
    Column("id", _NUMBER, primary_key=True),
    Column("size", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)

# Bytes that no record refers to any more and that are still to be wiped; offset is NULL for a whole file. `user` is the
# owner of a version that a newer one replaced, whose bytes may wait; NULL for bytes that must not.
ERASURES = Table(
    "erasures",
    STORE,
    Column("id", _NUMBER, primary_key=True),
    Column("blob", Text, nullable=False),
    Column("offset", BigInteger),
    Column("length", BigInteger),
    Column("tenant", Text),
    Column("user", LargeBinary),
)

# The columns of `manifest.ManifestRow`, in that order.
RECORDS = Table(
    "records",
    STORE,
    Column("tenant", Text, primary_key=True),
    Column("user", LargeBinary, primary_key=True),
    Column("version", BigInteger, primary_key=True),
    Column("parent", BigInteger),
    Column("tier", Text, nullable=False),
    Column("written", BigInteger, nullable=False),
    Column("facts", Text, nullable=False),
    Column("layout", BigInteger),
    Column("blob", Text),
    Column("offset", BigInteger),
    Column("length", BigInteger, nullable=False),
    Column("xxh3", LargeBinary),
    Column("sha256", LargeBinary),
    Column("embedding", LargeBinary, nullable=False),
    Index("records_by_blob", "blob"),
    **_TREE,
)

USERS = Table(
    "people", LOG, Column("tenant", Text, primary_key=True), Column("user", LargeBinary, primary_key=True), **_TREE
)

# `number` is the order of arrival; numbers are never reused.
INTERACTIONS = Table(
    "interactions",
    LOG,
    Column("number", _NUMBER, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("user", LargeBinary, nullable=False),
    Column("id", Text, nullable=False),
    Column("prompt", Text, nullable=False),
    Column("target", Text, nullable=False),
    Column("time", Double),
    Column("received", Double, nullable=False),
    UniqueConstraint("tenant", "user", "id"),
    sqlite_autoincrement=True,
)

# `wanted` counts fit requests; a fit that began before the last request is queued again when it ends. `lease` is the
# time, in seconds since 1970, after which another worker may take over a fit; only PostgreSQL uses it.
FITS = Table(
    "fits",
    LOG,
    Column("tenant", Text, primary_key=True),
    Column("user", LargeBinary, primary_key=True),
    Column("state", Text, nullable=False),
    Column("place", BigInteger),
    Column("wanted", BigInteger, nullable=False),
    Column("claim", BigInteger),
    Column("attempts", BigInteger, nullable=False),
    Column("progress", Double, nullable=False),
    Column("phase", Text),
    Column("message", Text),
    Column("version", BigInteger),
    Column("lease", Double),
    Index("fits_by_place", "state", "place"),
    **_TREE,
)

COUNTERS = Table(
    "counters", LOG, Column("name", Text, primary_key=True), Column("value", BigInteger, nullable=False), **_TREE
)

# `user` is NULL once only write-ahead logs remain to be emptied.
DELETIONS = Table(
    "deletions",
    LOG,
    Column("job", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("user", LargeBinary),
    Column("state", Text, nullable=False),
    Column("ended", Double),
    **_TREE,
)

# `version` is NULL for an update that was not promoted; `facts` is JSON.
UPDATES = Table(
    "updates",
    LOG,
    Column("number", _NUMBER, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("user", LargeBinary, nullable=False),
    Column("ended", Double, nullable=False),
    Column("base", BigInteger, nullable=False),
    Column("version", BigInteger),
    Column("seconds", Double, nullable=False),
    Column("reason", Text, nullable=False),
    Column("facts", Text, nullable=False),
    Index("updates_by_user", "tenant", "user", "number"),
    sqlite_autoincrement=True,
)

# In PostgreSQL only, beside the tables above; a run with SQLite keeps these in small files.
RUN = MetaData()

# The names of `tombstones.py`, keyed hashes.
TOMBSTONES = Table("tombstones", RUN, Column("name", Text, primary_key=True))

# `scopes` are divided by spaces; `created` is in seconds since 1970.
API_KEYS = Table(
    "api_keys",
    RUN,
    Column("sha256", Text, primary_key=True),
    Column("id", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("scopes", Text, nullable=False),
    Column("created", BigInteger, nullable=False),
)

# "tombstones": the key of the hashes; "keys": there if a server needs API keys, even if there are none.
SETTINGS = Table("settings", RUN, Column("name", Text, primary_key=True), Column("value", Text, nullable=False))
