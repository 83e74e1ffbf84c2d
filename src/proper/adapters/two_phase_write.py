"""Two-phase write of a record: adapter bytes first, then the manifest row in a transaction.

The caller (`store`) takes the locks and handles failures.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass

import xxhash

from proper.adapters.manifest import ByteRange, Manifest, ManifestRow, key_of
from proper.adapters.records import UserRecord
from proper.adapters.serialization import pack
from proper.adapters.shards import BlobWriter
from proper.adapters.validation import require_sound
from proper.errors import StoreError
from proper.run_folder import Tier


@dataclass(frozen=True)
class Prepared:
    """A record whose adapter bytes are written and whose manifest row is not."""

    user: bytes
    tier: Tier
    embedding: bytes
    facts: str
    spec: str | None = None
    place: ByteRange | None = None
    xxh3: bytes | None = None
    sha256: bytes | None = None


def prepare(record: UserRecord, writer: BlobWriter, file_bytes: int) -> Prepared:
    """Write a record's adapter bytes, to a file of its own if they exceed `file_bytes`.

    Raises:
        StoreError: the record is invalid, or one of its numbers is not finite or absurdly large.
        OSError: the disk is full or broken.
    """
    require_sound(record.user, {"embedding": record.embedding, **(record.adapter or {})})
    facts = json.dumps(dict(record.facts), ensure_ascii=False)
    embedding = record.embedding.detach().float().cpu().numpy().tobytes()
    if record.adapter is None:
        if record.tier == "users":
            raise StoreError(f"user {record.user!r} cannot be on the tier 'users' without an adapter")
        return Prepared(key_of(record.user), record.tier, embedding, facts)
    spec, data = pack(record.adapter)
    place = writer.write_file(spec.header(), data) if len(data) > file_bytes else writer.append(data)
    hashes = xxhash.xxh3_64_digest(data), hashlib.sha256(data).digest()
    return Prepared(key_of(record.user), record.tier, embedding, facts, spec.text(), place, *hashes)


def commit(
    manifest: Manifest, tenant: str, prepared: Iterable[Prepared], sizes: Iterable[tuple[int, int]], keep: int
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
            facts=new.facts,
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
