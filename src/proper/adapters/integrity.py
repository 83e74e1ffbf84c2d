"""Consistency check and repair of the adapter store: sha256 of every adapter, validity of every row, orphaned bytes.

Adapters and embeddings must also be sound: finite, and of a magnitude that training produces.

Repair rolls a user whose adapter is damaged back to the newest undamaged version, or to the group tier if there is
none. What it removes (orphaned bytes, rows of damaged versions) goes into quarantine, because with a manifest restored
from an older backup, valid bytes look orphaned too. Check and repair may run beside readers and writers.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import xxhash

from proper.adapters.manifest import ByteRange, ManifestRow, shard_name, user_of
from proper.adapters.records import MADE, is_for_bound, restored, vector
from proper.adapters.serialization import fault_of, is_sound
from proper.adapters.shards import BlobError
from proper.adapters.store import AdapterStore
from proper.errors import StoreError, UnavailableError
from proper.files import atomic_path, private_folder, write_json
from proper.run_folder import Tier, UsersFolder
from proper.sqlite_files import read_only_error

Kind = Literal["manifest", "row", "missing", "torn", "flipped", "unsound", "orphan-file", "orphan-bytes", "log"]
_BLOB = re.compile(r"\d+\.shard|[0-9a-f]{32}\.safetensors")


_UNREADABLE = {
    *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN),
}
"""Errors of a process or of a share: the bytes may be intact."""


@dataclass(frozen=True)
class Finding:
    """One problem found by a check.

    Attributes:
        kind: "manifest": the database itself is damaged; "row": a row is invalid; "missing", "torn" (truncated) or
            "flipped" (bytes differ): an adapter's bytes; "unsound": numbers of an adapter or an embedding are not
            finite or absurdly large; "orphan-file", "orphan-bytes": no record refers to them; "log": the interaction
            log.
        text: the problem, with the user or file.
        user: the user of the damaged version; None for an orphan.
        repair: how it was repaired; empty if it was not.
    """

    kind: Kind
    text: str
    user: str | None = None
    version: int | None = None
    repair: str = ""


def one_line(path: Path, text: str) -> str:
    """Return an SQLite message as one line that names the file."""
    message = " ".join(text.split())
    return message if message.startswith(str(path)) else f"{path}: {message}"


def check(store: AdapterStore, repair: bool = False) -> list[Finding]:
    """Return all problems of a store, in all tenants; with `repair`, fix them.

    Raises:
        StoreError: the manifest or a file cannot be read, or a repair cannot be written.
        UnavailableError: the database does not answer, or the disk is full.
    """
    if repair and store.manifest.read_only:
        raise read_only_error(store.manifest.path)
    try:
        messages = store.manifest.damage()
    except UnavailableError:
        raise  # not damage
    except StoreError as error:
        messages = [str(error)]
    if messages:
        return [Finding("manifest", one_line(store.manifest.path, text)) for text in messages]
    if not store.manifest.read_only:
        store.shards.erase()
    findings: list[Finding] = []
    for _, rows in groupby(store.manifest.rows(), key=lambda row: row[:2]):
        findings += _check_user(store, list(rows), repair)
    findings += _orphan_files(store, repair)
    for number, size in store.manifest.shards().items():
        findings += _orphan_bytes(store, number, size, repair)
    return findings


def _check_user(store: AdapterStore, rows: list[ManifestRow], repair: bool) -> list[Finding]:
    bad = {row.version: finding for row in rows if (finding := _check_row(store, row)) is not None}
    if not bad:
        return []
    with nullcontext() if store.manifest.read_only else store.manifest.transaction():
        # Versions that were replaced, deleted or moved since they were read do not count as damaged.
        now = store.manifest.versions(rows[0].tenant, rows[0].user)
        bad = {row.version: bad[row.version] for row in now if row.version in bad and row in rows}
        if not bad or not repair:
            return list(bad.values())
        for row in now:
            if row.version in bad:
                _put_row_aside(store.folder, row._asdict())
        done = _fall_back(store, now, bad)
    return [replace(finding, repair=done) for finding in bad.values()]


def _check_row(store: AdapterStore, row: ManifestRow) -> Finding | None:
    found = _invalid(store, row)
    kind: Kind = "row"
    if found is None and row.place is not None:
        kind, found = _damage(store, row, row.place)
    if not found:
        kind, found = _unsound(store, row)
    if not found:
        return None
    user = user_of(row.user)
    return Finding(kind, f"user {user!r}, version {row.version}: {found}", user, row.version)


def _invalid(store: AdapterStore, row: ManifestRow) -> str | None:
    """Return why a manifest row is invalid by itself, without reading the adapter; None if it is valid."""
    if row.tier not in (Tier.GROUPS, Tier.USERS):
        return f"no such tier: {row.tier!r}"
    if len(row.embedding) % 4:
        return "its embedding is cut off"
    try:
        if not isinstance(json.loads(row.facts), dict):
            return "its metadata is not a mapping"
    except ValueError:
        return "its metadata is not JSON"
    if row.blob is None:
        return "no adapter, on the tier 'users'" if row.tier == "users" else None
    if not _BLOB.fullmatch(row.blob) or not isinstance(row.offset, int) or row.offset < 0:
        return f"no such byte range: {row.blob!r} at {row.offset!r}"
    try:
        size = store.spec(row).size
    except (StoreError, ValueError) as error:
        return str(error)
    return None if size == row.length else f"{row.length} bytes, where its layout has {size}"


def _damage(store: AdapterStore, row: ManifestRow, place: ByteRange) -> tuple[Kind, str]:
    """Return the kind of damage to an adapter's bytes and a description, which is empty if they are intact."""
    path, left = store.shards.where(place.blob), place.length
    sha256, xxh3 = hashlib.sha256(), xxhash.xxh3_64()
    try:
        for piece in store.shards.pieces(place):
            sha256.update(piece)
            xxh3.update(piece)
            left -= len(piece)
    except FileNotFoundError:
        return "missing", f"{path} is missing"
    except OSError as error:
        if error.errno in _UNREADABLE:
            raise StoreError(f"{path}: cannot be read: {error.strerror or error}; nothing is repaired") from error
        return "missing", f"{path}: {error.strerror}"
    if left:
        return "torn", f"{path} ends {left} bytes too early"
    if sha256.digest() != row.sha256:
        return "flipped", f"{path}: other bytes than were written (sha256)"
    return ("flipped", "its checksum (xxh3) differs") if xxh3.digest() != row.xxh3 else ("row", "")


def _unsound(store: AdapterStore, row: ManifestRow) -> tuple[Kind, str]:
    """Return which tensor of an intact record has unusable numbers (see `serialization`); an empty text if none has."""
    try:
        record = store.record(user_of(row.user), row, coded=True)
    except BlobError as error:  # damaged since its bytes were checked
        return "flipped", str(error)
    return "unsound", fault_of({"embedding": record.embedding, **(record.adapter or {})}) or ""


def _fall_back(store: AdapterStore, now: list[ManifestRow], bad: dict[int, Finding]) -> str:
    """Delete a user's bad versions inside a transaction, which orphans their bytes; return what was done, as text."""
    manifest, bound = store.manifest, store.manifest.metadata()
    good = [row for row in now if row.version not in bad and is_for_bound(row, bound)]
    done = "removed this version; a newer one is current"
    if now[0].version in bad:
        sound = [row for row in now if _embedding_is_sound(row)]
        if good:
            manifest.add(restored(good[0], now[0], "repair"))
            done = f"went back to version {good[0].version}"
        elif sound:
            reason = "the adapter was damaged, and no other version was left"
            metadata = json.dumps({"reason": reason, MADE: {"by": "repair", "of": sound[0].version}})
            bare = sound[0]._replace(layout=None, blob=None, offset=None, length=0, xxh3=None, sha256=None)
            manifest.add(bare._replace(tier="groups", facts=metadata))
            done = "went back to the group tier"
        else:
            done = "removed the user: nothing of them was left"
    for row in now:
        if row.version in bad:
            manifest.remove(row)
    return done


def _embedding_is_sound(row: ManifestRow) -> bool:
    return len(row.embedding) % 4 == 0 and is_sound(vector(row.embedding))


def _orphan_files(store: AdapterStore, repair: bool) -> Iterator[Finding]:
    manifest = store.manifest
    # No writer may be between writing a blob and committing its row.
    with nullcontext() if manifest.read_only else store.writing(exclusive=True):
        owned = manifest.referenced() | {each.blob for each in manifest.erasures()}
        owned |= {shard_name(number) for number in manifest.shards()}
        for blob, size in store.shards.blobs():
            if blob not in owned:
                done = ""
                if repair:
                    target = _quarantined(store.folder, blob)
                    store.shards.set_aside(blob, target)
                    done = f"moved to {target}"
                yield Finding(
                    "orphan-file", f"{store.shards.where(blob)}: {size} bytes that no record refers to", repair=done
                )


def _orphan_bytes(store: AdapterStore, number: int, size: int, repair: bool) -> Iterator[Finding]:
    """Find the bytes of a shard that no record refers to; with `repair`, quarantine and erase them."""

    def keep(name: str, pieces: Iterable[bytes]) -> None:
        with atomic_path(_quarantined(store.folder, name)) as temporary, temporary.open("wb") as copy:
            copy.writelines(pieces)

    found = store.shards.orphan_bytes(number, size, keep if repair else None)
    if found:
        text = f"{store.shards.where(shard_name(number))}: {found} bytes that no record refers to"
        yield Finding("orphan-bytes", text, repair=f"moved to {store.paths.quarantine}" if repair else "")


def _put_row_aside(users: Path, row: Mapping[str, Any]) -> None:
    """Write a manifest row into quarantine as JSON, bytes as hexadecimal digits."""
    values = {key: value.hex() if isinstance(value, bytes) else value for key, value in row.items()}
    # JSON has no NaN, and a damaged row may contain any value.
    write_json(_quarantined(users, "row.json"), json.loads(json.dumps(values, default=str), parse_constant=str))


def _quarantined(users: Path, name: str) -> Path:
    """Return an unused path in the quarantine folder."""
    folder = UsersFolder(users).quarantine
    private_folder(folder)
    taken = sum(1 for _ in folder.iterdir())
    while os.path.lexists(path := folder / f"{taken:06}-{name}"):
        taken += 1
    return path
