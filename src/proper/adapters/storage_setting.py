"""Shard storage of a run: its own folder, or the bucket that its `storage.json` names.

RUN/storage.json    {"shards": "s3://BUCKET/PREFIX", "cache_mb": 4096, "id": HEX}; without it, the folder
PREFIX/owner        the same id: a prefix belongs to one run
PREFIX/users/       objects of the run's store; PREFIX/seeds/1/users/ and so on: of nested runs
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from proper.adapters.bucket import Bucket, BucketError
from proper.adapters.folder_shards import FolderShards
from proper.adapters.manifest import Manifest
from proper.adapters.objects import ObjectShards
from proper.adapters.shard_cache import ShardCache
from proper.adapters.storage import ShardStorage
from proper.errors import InputError
from proper.files import write_json
from proper.json_records import read_record
from proper.run_folder import RunFolder, UsersFolder, nested_runs

CACHE_MB = 4096
"""Default limit of the local cache of one store, in MiB."""

EXAMPLE = "s3://BUCKET/PREFIX"
"""The form of a bucket's URL, for messages."""

_OWNER = "owner"


@dataclass(frozen=True)
class BucketSetting:
    """The setting of a run whose adapters are in a bucket.

    Attributes:
        bucket: bucket and prefix.
        cache_mb: limit of the local cache in MiB.
        id: the run's id, which the prefix has in its object `owner`.
    """

    bucket: Bucket
    cache_mb: int
    id: str

    @property
    def url(self) -> str:
        """The URL without options."""
        return self.bucket.url.rstrip("/")

    def below(self, folder: str) -> Bucket:
        """Return the bucket with a longer prefix."""
        return Bucket(self.bucket.name, f"{self.bucket.prefix}{folder}/")

    def claim(self) -> None:
        """Make the prefix this run's own, or check that it is.

        Raises:
            BucketError: it belongs to another run, or the bucket cannot be used.
        """
        _claim(self.bucket.name, self.bucket.prefix, self.id)


@lru_cache(maxsize=64)
def _claim(name: str, prefix: str, run: str) -> None:
    bucket, owner = Bucket(name, prefix), run.encode()
    found = bucket.get(_OWNER)
    if found is None and bucket.put_new(_OWNER, owner):
        if bucket.put_new(_OWNER, owner):
            bucket.remove(_OWNER)
            raise BucketError(
                f"{bucket.url}: the server overwrites an object in spite of If-None-Match: *; two writers would lose "
                "adapters there"
            )
    elif (bucket.get(_OWNER) if found is None else found) != owner:
        raise BucketError(f"{bucket.url}: holds the adapters of another run; choose another prefix")


def parse_url(url: str, run: str) -> BucketSetting:
    """Return the setting of the run with the id `run` for an option `--store`.

    Raises:
        InputError: the text is not such a URL.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InputError(f"--store {url}: {error}; write {EXAMPLE}") from error
    options = parse_qs(parts.query, keep_blank_values=True)
    megabytes = options.pop("cache_mb", [str(CACHE_MB)])[-1]
    if "@" in parts.netloc:
        raise InputError(
            f"--store {parts.scheme}://...: has credentials in the URL; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if parts.scheme != "s3" or not parts.netloc or ":" in parts.netloc or options or parts.fragment:
        raise InputError(f"--store {url}: not a URL like {EXAMPLE} or {EXAMPLE}?cache_mb=4096")
    if not megabytes.isdecimal():
        raise InputError(f"--store {url}: cache_mb is not a number of MiB")
    prefix = parts.path.strip("/")
    return BucketSetting(Bucket(parts.netloc, f"{prefix}/" if prefix else ""), int(megabytes), run)


def setting_of(run: Path) -> BucketSetting | None:
    """Return the recorded setting of a run folder, or of the run that a nested folder belongs to; None: the folder."""
    path = RunFolder(run).home.storage
    if not path.is_file():
        return None
    found = read_record(path, shards=str, cache_mb=int, id=str)
    try:
        return parse_url(f"{found['shards']}?cache_mb={found['cache_mb']}", found["id"])
    except InputError as error:
        raise InputError(f"{path}: not a storage setting: {error}") from error


def record(run: Path, url: str) -> None:
    """Record the storage of a run folder that has no adapters yet, and claim the prefix.

    A run that was started with the same URL keeps its setting; only the limit of the cache may change.

    Raises:
        InputError: the run keeps its adapters elsewhere, or the URL cannot be used.
        BucketError: the bucket cannot be used.
    """
    folder, found = RunFolder(run), setting_of(run)
    new = parse_url(url, secrets.token_hex(16) if found is None else found.id)
    if found is not None and found.url != new.url:
        raise InputError(
            f"--store {url}: this run keeps its adapters in {found.url}; leave --store out, or start a run"
        )
    if found is None and any(_has_adapters(RunFolder(each).users) for each in nested_runs(run)):
        raise InputError(f"--store {url}: this run keeps its adapters in {folder.users.blobs}; start another run")
    new.claim()
    write_json(folder.storage, {"shards": new.url, "cache_mb": new.cache_mb, "id": new.id})


def forget(run: Path) -> None:
    """Undo `record` for a run that has written no adapters: give the prefix up, and remove the setting.

    Raises:
        BucketError: the bucket cannot be used.
    """
    setting = setting_of(run)
    if setting is not None:
        setting.bucket.remove(_OWNER)
        _claim.cache_clear()
    RunFolder(run).storage.unlink(missing_ok=True)


def _has_adapters(users: UsersFolder) -> bool:
    return users.manifest.is_file() or (users.blobs.is_dir() and any(users.blobs.iterdir()))


def open_storage(paths: UsersFolder, manifest: Manifest) -> ShardStorage:
    """Return the storage of a store; only a run's own store and those of nested runs are in its bucket."""
    found = _bucket_of(paths)
    if found is None:
        return FolderShards(paths.blobs, manifest, paths.lock)
    setting, bucket = found
    cache = ShardCache(paths.cache, setting.cache_mb << 20)
    return ObjectShards(bucket, manifest, cache, paths.lock, setting.claim)


def blobs_of(paths: UsersFolder) -> str | None:
    """Return the folder or URL where blobs of a store are; None if there are none."""
    found = _bucket_of(paths)
    if found is not None:
        return next((found[1].url for _ in found[1].objects()), None)
    return str(paths.blobs) if paths.blobs.is_dir() and any(paths.blobs.iterdir()) else None


def _bucket_of(paths: UsersFolder) -> tuple[BucketSetting, Bucket] | None:
    run = RunFolder(paths.path.absolute().parent)
    if run.users.path.name != paths.path.name:
        return None  # a temporary store
    setting = setting_of(run.path)
    if setting is None:
        return None
    return setting, setting.below((run.path / paths.path.name).relative_to(run.home.path).as_posix())
