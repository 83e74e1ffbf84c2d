"""SQL statements of the manifest."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    and_,
    bindparam,
    cast,
    delete,
    func,
    literal_column,
    select,
    tuple_,
    update,
)

from proper.databases.statements import Insert, Statement, of_user, row_of
from proper.databases.tables import ERASURES, LAYOUTS, RECORDS, SHARDS, STORE_METADATA

PAGE = 1000
"""Number of rows that a paginated query returns."""

_OWN = of_user(RECORDS)
_TENANT = RECORDS.c.tenant == bindparam("tenant")
_VERSIONS = select(RECORDS).where(_OWN).order_by(RECORDS.c.version.desc())
_NEWER = RECORDS.alias("newer")
_NEWEST = (
    select(func.max(_NEWER.c.version))
    .where(_NEWER.c.tenant == RECORDS.c.tenant, _NEWER.c.user == RECORDS.c.user)
    .scalar_subquery()
)
_HEADS = select(RECORDS).where(_TENANT, RECORDS.c.version == _NEWEST).order_by(RECORDS.c.user).limit(PAGE)
_KEY = (RECORDS.c.tenant, RECORDS.c.user, RECORDS.c.version)
_ROWS = select(RECORDS).order_by(*_KEY).limit(PAGE)
_RANGE = and_(RECORDS.c.blob == bindparam("at_blob"), RECORDS.c.offset == bindparam("at_offset"))
_PLACES = (
    select(RECORDS.c.blob, RECORDS.c.offset, RECORDS.c.length).where(RECORDS.c.blob.is_not(None)).distinct().subquery()
)


def _added(insert: Insert) -> Any:
    """Insert a row whose version is the user's next one."""
    newest = func.max(RECORDS.c.version)
    own = {**row_of(RECORDS), "version": func.coalesce(newest, 0) + 1, "parent": newest}
    row = select(*(own[column.name] for column in RECORDS.columns)).where(_OWN)
    return insert(RECORDS).from_select(RECORDS.columns.keys(), row).returning(RECORDS.c.version)


def _bound(insert: Insert) -> Any:
    new = insert(STORE_METADATA)
    return new.on_conflict_do_update(index_elements=[STORE_METADATA.c.key], set_={"value": new.excluded.value})


LIST_METADATA = Statement(lambda _: select(STORE_METADATA))
BIND = Statement(_bound)
HEAD = Statement(lambda _: _VERSIONS.limit(literal_column("1")))
ALL = Statement(lambda _: _VERSIONS)
FIRST_HEADS = Statement(lambda _: _HEADS)
NEXT_HEADS = Statement(lambda _: _HEADS.where(RECORDS.c.user > bindparam("after")))
FIRST_ROWS = Statement(lambda _: _ROWS)
NEXT_ROWS = Statement(
    lambda _: _ROWS.where(tuple_(*_KEY) > tuple_(bindparam("tenant"), bindparam("user"), bindparam("version")))
)
ADD = Statement(_added)
DROP = Statement(lambda _: delete(RECORDS).where(_OWN, RECORDS.c.version == bindparam("version")))
SHARED = Statement(lambda _: select(RECORDS.c.version).where(_OWN, _RANGE))
REFERS = Statement(lambda _: select(RECORDS.c.version).where(RECORDS.c.blob == bindparam("blob")).limit(1))
BLOBS = Statement(lambda _: select(RECORDS.c.blob).where(RECORDS.c.blob.is_not(None)).distinct())
USERS = Statement(lambda _: select(RECORDS.c.tenant, RECORDS.c.user).distinct())
ERASE = Statement(lambda insert: insert(ERASURES).values(row_of(ERASURES, without="id")))
DISOWN = Statement(
    lambda _: (
        update(ERASURES)
        .where(ERASURES.c.tenant == bindparam("of_tenant"), ERASURES.c.user == bindparam("of_user"))
        .values(tenant=None, user=None)
    )
)
LIST_ERASURES = Statement(
    lambda _: select(ERASURES.c.id, ERASURES.c.blob, ERASURES.c.offset, ERASURES.c.length).order_by(ERASURES.c.blob)
)
REPLACED = Statement(lambda _: select(ERASURES.c.id).where(ERASURES.c.user.is_not(None)))
ERASED = Statement(
    lambda _: delete(ERASURES).where(
        ERASURES.c.id == bindparam("id"),
        ERASURES.c.blob == bindparam("blob"),
        ERASURES.c.offset.is_not_distinct_from(bindparam("offset")),
        ERASURES.c.length.is_not_distinct_from(bindparam("length")),
    )
)
LAYOUT_ID = Statement(lambda _: select(LAYOUTS.c.id).where(LAYOUTS.c.spec == bindparam("spec")))
ADD_LAYOUT = Statement(lambda insert: insert(LAYOUTS).values(spec=bindparam("spec")).returning(LAYOUTS.c.id))
LAYOUT = Statement(lambda _: select(LAYOUTS.c.spec).where(LAYOUTS.c.id == bindparam("id")))
LIST_SHARDS = Statement(lambda _: select(SHARDS).order_by(SHARDS.c.id))
SHARD_SIZE = Statement(lambda _: select(SHARDS.c.size).where(SHARDS.c.id == bindparam("id")))
GROW = Statement(lambda _: update(SHARDS).where(SHARDS.c.id == bindparam("number")).values(size=bindparam("grown")))
ADD_SHARD = Statement(lambda insert: insert(SHARDS).values(size=0).returning(SHARDS.c.id))
DROP_SHARD = Statement(lambda _: delete(SHARDS).where(SHARDS.c.id == bindparam("id")))
LIVE = Statement(
    lambda _: select(_PLACES.c.blob, cast(func.sum(_PLACES.c.length), BigInteger)).group_by(_PLACES.c.blob)
)
OWNERS = Statement(
    lambda _: (
        select(RECORDS.c.blob, RECORDS.c.offset, RECORDS.c.length, RECORDS.c.tenant, RECORDS.c.user)
        .where(RECORDS.c.blob == bindparam("blob"))
        .order_by(RECORDS.c.offset)
    )
)
MOVE = Statement(
    lambda _: update(RECORDS).where(_OWN, _RANGE).values(blob=bindparam("to_blob"), offset=bindparam("to_offset"))
)
