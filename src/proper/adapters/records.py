"""User records of the adapter store, and their two-phase write: adapter bytes first, then the manifest row.

After a crash between the phases no row refers to the bytes: they are orphans, which a repair finds. The store takes
the locks and handles failures.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import xxhash
from torch import Tensor

from proper.adapters.manifest import ByteRange, Manifest, ManifestRow, key_of, user_of
from proper.adapters.serialization import pack, require_sound
from proper.adapters.storage import ShardWriter, require_grown
from proper.errors import StoreError
from proper.run_folder import Tier

MADE = "made"
"""Key in a record's metadata: how this version was made, if not by training; see `restored`."""

BOUND_AT = "bound_at"
"""Key in the store's metadata: when it was last bound to other values (refreshed groups), in seconds of Unix time."""

_TIERS = {str(tier): tier for tier in (Tier.GROUPS, Tier.USERS)}


@dataclass(frozen=True)
class UserRecord:
    """One user's own state.

    Attributes:
        user: any string.
        tier: GROUPS (embedding only) or USERS (embedding and adapter).
        embedding: e_u (D,), fp32.
        adapter: stacked tensors, as `layers.layout.Layout` names them, or their `quantization.encode` form; None on the
            group tier.
        metadata: JSON-serializable, about how the record was made.
    """

    user: str
    tier: Tier
    embedding: Tensor
    adapter: Mapping[str, Tensor] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Head:
    """A user's current record without the adapter.

    Attributes:
        version: increases with every change of this user, a rollback included; starts again after a delete.
        checksum: xxh3 of the adapter's bytes; None without an adapter.
    """

    version: int
    tier: Tier
    embedding: Tensor
    checksum: bytes | None = None


@dataclass(frozen=True)
class Version:
    """One stored version of a user.

    Attributes:
        parent: the version that was current before; None for the first.
        bytes: size of adapter and embedding.
        written: time of writing, in whole seconds of Unix time.
        checksum: xxh3 of the adapter's bytes; two versions with equal checksums have the same adapter.
    """

    version: int
    parent: int | None
    tier: Tier
    bytes: int
    written: int
    checksum: str | None
    metadata: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Return the fields by name, as files and `--json` have them: there the metadata is called `facts`."""
        fields = asdict(self)
        fields["facts"] = fields.pop("metadata")
        return fields


def head_of(row: ManifestRow) -> Head:
    """Return the head of a manifest row."""
    return Head(row.version, tier_of(row), vector(row.embedding), row.xxh3)


def version_of(row: ManifestRow) -> Version:
    """Return the version of a manifest row."""
    size, checksum = row.length + len(row.embedding), row.xxh3.hex() if row.xxh3 else None
    return Version(row.version, row.parent, tier_of(row), size, row.written, checksum, json.loads(row.facts))


def tier_of(row: ManifestRow) -> Tier:
    """Return the tier of a manifest row.

    Raises:
        StoreError: the row is damaged: no record has its tier.
    """
    tier = _TIERS.get(row.tier)
    if tier is None:
        raise StoreError(f"user {user_of(row.user)!r}: unknown tier {row.tier!r}; run: proper users check DIR")
    return tier


def restored(row: ManifestRow, current: ManifestRow, by: str) -> ManifestRow:
    """Return a row with the content of an older version, to be added as the new current version.

    Its metadata says so under `MADE`: `by` ("rollback" or "repair"), the versions `of` and `instead_of`, and when the
    content was first `written`, in seconds of Unix time; `before` is the older version's own entry, if it has one.

    Args:
        row: the older version.
        current: the version that it replaces.
        by: what restores it.
    """
    metadata = json.loads(row.facts)
    before = metadata.get(MADE, {})
    made = {"by": by, "of": row.version, "instead_of": current.version, "written": before.get("written", row.written)}
    first = before.get("before") if before.get("by") in ("rollback", "repair") else before
    metadata = {**metadata, MADE: {**made, **({"before": first} if first else {})}}
    return row._replace(written=int(time.time()), facts=json.dumps(metadata, ensure_ascii=False))


def is_for_bound(row: ManifestRow, bound: Mapping[str, str]) -> bool:
    """Return whether a version was made since the store is bound to its present values: others fit the groups before.

    Args:
        row: the version.
        bound: the store's metadata.
    """
    first = json.loads(row.facts).get(MADE, {}).get("written", row.written)
    return bool(first >= int(bound.get(BOUND_AT, 0)))


def vector(data: bytes) -> Tensor:
    """Return an embedding (D,), fp32, from its bytes in the manifest."""
    return torch.frombuffer(bytearray(data), dtype=torch.float32) if data else torch.empty(0)


@dataclass(frozen=True)
class Prepared:
    """A record whose adapter bytes are written and whose manifest row is not."""

    user: bytes
    tier: Tier
    embedding: bytes
    metadata: str
    spec: str | None = None
    place: ByteRange | None = None
    xxh3: bytes | None = None
    sha256: bytes | None = None


def prepare(record: UserRecord, writer: ShardWriter, file_bytes: int) -> Prepared:
    """Write a record's adapter bytes, to a file of its own if they exceed `file_bytes`.

    Raises:
        StoreError: the record is invalid, or one of its numbers is not finite or absurdly large.
        OSError: the disk is full or broken.
    """
    require_sound(record.user, {"embedding": record.embedding, **(record.adapter or {})})
    metadata = json.dumps(dict(record.metadata), ensure_ascii=False)
    embedding = record.embedding.detach().float().cpu().numpy().tobytes()
    if record.adapter is None:
        if record.tier == Tier.USERS:
            raise StoreError(f"user {record.user!r} cannot be on the tier 'users' without an adapter")
        return Prepared(key_of(record.user), record.tier, embedding, metadata)
    spec, data = pack(record.adapter)
    place = writer.write_file(spec.header(), data) if len(data) > file_bytes else writer.append(data)
    hashes = xxhash.xxh3_64_digest(data), hashlib.sha256(data).digest()
    return Prepared(key_of(record.user), record.tier, embedding, metadata, spec.text(), place, *hashes)


def commit(
    manifest: Manifest, tenant: str, prepared: Iterable[Prepared], sizes: Sequence[tuple[int, int]], keep: int
) -> None:
    """Add the manifest rows of prepared records, and drop versions beyond `keep` (inside a transaction)."""
    now, layouts = int(time.time()), dict[str, int]()
    for new in prepared:
        if new.spec is not None and new.spec not in layouts:
            layouts[new.spec] = manifest.layout_id(new.spec)
        row = ManifestRow(
            tenant=tenant,
            user=new.user,
            version=0,
            parent=None,
            tier=new.tier,
            written=now,
            facts=new.metadata,
            layout=None if new.spec is None else layouts[new.spec],
            blob=None if new.place is None else new.place.blob,
            offset=None if new.place is None else new.place.offset,
            length=0 if new.place is None else new.place.length,
            xxh3=new.xxh3,
            sha256=new.sha256,
            embedding=new.embedding,
        )
        if manifest.add(row) > keep:
            manifest.prune(tenant, new.user, keep)
    manifest.grow(sizes)
    require_grown(manifest, sizes)
