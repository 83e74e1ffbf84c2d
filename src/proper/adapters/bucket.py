"""Objects below a prefix of an S3 bucket, through boto3: conditional puts, ranged reads, all versions of an object.

boto3 rather than obstore or fsspec: a deletion has to list and remove the versions of an object, and to abort
unfinished uploads, which those two have no calls for. Endpoint, region and credentials come from the standard AWS_*
variables or files. boto3 retries requests that fail on the way or that the server throttles.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from proper.errors import StoreError, UnavailableError
from proper.extras import needs_extra

T = TypeVar("T")
PART_BYTES = 8 << 20
"""An object larger than this is uploaded in parts of this size, several at a time."""

_AT_ONCE = 4  # parts of an upload at the same time
_ATTEMPTS = 5  # requests, before the bucket counts as unavailable
_PIECE = 1 << 20  # bytes of an answer that are read at once
_WRITER = "writer"  # key of an object's metadata: which put wrote it
_ENVIRONMENT = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE")
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_DENIED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "403")
_BUSY = ("SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests", "429")
_NO_VERSIONS = ("NotImplemented", "MethodNotAllowed", "501")


class BucketError(UnavailableError):
    """A bucket cannot be used with this URL and these credentials. Exit code 2."""

    exit_code = 2


class MissingObjectError(StoreError):
    """An object does not exist, or is shorter than the requested range."""


class ObjectVersion(NamedTuple):
    """One version of an object; `key` is relative to the bucket's prefix. `id` is "null" in an unversioned bucket.

    A marker has no bytes: it says that the object was deleted.
    """

    key: str
    id: str
    size: int
    modified: datetime
    is_marker: bool = False


class Bucket:
    """The objects below `prefix` in a bucket. Thread-safe.

    Args:
        name: the bucket.
        prefix: "" or a path that ends in "/"; keys are relative to it.
    """

    def __init__(self, name: str, prefix: str) -> None:
        self.name, self.prefix = name, prefix
        self._versioned: bool | None = None

    @property
    def url(self) -> str:
        """The URL of the prefix, which ends in "/"."""
        return f"s3://{self.name}/{self.prefix}"

    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object unless one of this key exists; return whether this call wrote it.

        The server decides (If-None-Match), so of two writers one succeeds. A large object is uploaded in parts.
        """
        writer = secrets.token_hex(16)
        where = {"Bucket": self.name, "Key": self.prefix + key}
        with self._errors(), _conflicts() as conflict:
            if len(data) <= PART_BYTES:
                self._client.put_object(**where, Body=data, IfNoneMatch="*", Metadata={_WRITER: writer})
            else:
                self._put_parts(where, data, writer)
        if not conflict:
            return True
        with self._errors():  # a request that was repeated after its answer was lost meets the object it wrote itself
            found = self._client.head_object(**where)
        return bool(found["Metadata"].get(_WRITER) == writer)

    def _put_parts(self, where: dict[str, str], data: bytes, writer: str) -> None:
        client, view = self._client, memoryview(data)
        upload = client.create_multipart_upload(**where, Metadata={_WRITER: writer})["UploadId"]

        def part(at: int) -> dict[str, Any]:
            number, body = at // PART_BYTES + 1, bytes(view[at : at + PART_BYTES])
            sent = client.upload_part(**where, UploadId=upload, PartNumber=number, Body=body)
            return {"PartNumber": number, "ETag": sent["ETag"]}

        try:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                parts = list(pool.map(part, range(0, len(data), PART_BYTES)))
            client.complete_multipart_upload(
                **where, UploadId=upload, MultipartUpload={"Parts": parts}, IfNoneMatch="*"
            )
        except BaseException:
            with suppress(Exception):  # the error of the upload counts; `abort_uploads` finds what is left
                client.abort_multipart_upload(**where, UploadId=upload)
            raise

    def read(self, key: str, offset: int, length: int) -> bytes:
        """Return a range of an object.

        Raises:
            MissingObjectError: the object does not exist or is shorter.
        """
        if not length:
            return b""
        wanted = f"bytes={offset}-{offset + length - 1}"

        def get() -> bytes:
            found = self._client.get_object(Bucket=self.name, Key=self.prefix + key, Range=wanted)
            return bytes(found["Body"].read())

        data = self._again(get)
        if len(data) < length:
            raise MissingObjectError(f"{self.url}{key}: ends {length - len(data)} bytes too early")
        return data

    def size(self, key: str) -> int | None:
        """Return the size of an object, or None if it does not exist."""
        try:
            with self._errors():
                return int(self._client.head_object(Bucket=self.name, Key=self.prefix + key)["ContentLength"])
        except MissingObjectError:
            return None

    def get(self, key: str) -> bytes | None:
        """Return a small object, or None if it does not exist."""
        try:
            return self._again(
                lambda: bytes(self._client.get_object(Bucket=self.name, Key=self.prefix + key)["Body"].read())
            )
        except MissingObjectError:
            return None

    def pieces(self, version: ObjectVersion) -> Iterator[bytes]:
        """Yield the bytes of one version of an object, in pieces of at most 1 MiB."""
        which = {} if version.id == "null" else {"VersionId": version.id}
        with self._errors():
            found = self._client.get_object(Bucket=self.name, Key=self.prefix + version.key, **which)
            yield from found["Body"].iter_chunks(_PIECE)

    def objects(self) -> Iterator[ObjectVersion]:
        """Yield the current version of every object below the prefix, ordered by key, without version ids."""
        with self._errors():
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=self.prefix):
                for each in page.get("Contents", ()):
                    yield ObjectVersion(each["Key"][len(self.prefix) :], "null", each["Size"], each["LastModified"])

    def versions(self, key: str = "") -> Iterator[ObjectVersion]:
        """Yield all versions of the objects whose key begins with `key`, delete markers included."""
        if not self.is_versioned:
            yield from (each for each in self.objects() if each.key.startswith(key))
            return
        with self._errors():
            pages = self._client.get_paginator("list_object_versions")
            for page in pages.paginate(Bucket=self.name, Prefix=self.prefix + key):
                for kind in ("Versions", "DeleteMarkers"):
                    for each in page.get(kind, ()):
                        name, size, is_marker = each["Key"][len(self.prefix) :], each.get("Size", 0), kind != "Versions"
                        yield ObjectVersion(name, each["VersionId"], size, each["LastModified"], is_marker)

    @property
    def is_versioned(self) -> bool:
        """Whether the bucket keeps or may have kept versions of objects that were removed."""
        if self._versioned is None:
            with self._errors():
                try:
                    status = self._client.get_bucket_versioning(Bucket=self.name).get("Status")
                except self._client.exceptions.ClientError as error:
                    if _code(error) not in _NO_VERSIONS:
                        raise
                    status = None  # a server without versions
            self._versioned = status is not None
        return self._versioned

    def remove(self, key: str) -> None:
        """Remove an object with all its versions and delete markers; no error if there is none.

        Raises:
            StoreError: the server kept a version.
        """
        with self._errors():
            if not self.is_versioned:
                self._client.delete_object(Bucket=self.name, Key=self.prefix + key)
                return
            for each in [each for each in self.versions(key) if each.key == key]:
                self._client.delete_object(Bucket=self.name, Key=self.prefix + key, VersionId=each.id)

    def abort_uploads(self, key: str = "") -> int:
        """Remove the parts of unfinished uploads of objects whose key begins with `key`; return how many there were."""
        uploads = list(self.uploads(key))
        with self._errors():
            for each in uploads:
                with suppress(self._client.exceptions.NoSuchUpload):  # finished or aborted meanwhile
                    self._client.abort_multipart_upload(Bucket=self.name, Key=self.prefix + each.key, UploadId=each.id)
        return len(uploads)

    def uploads(self, key: str = "") -> Iterator[ObjectVersion]:
        """Yield the unfinished uploads of objects whose key begins with `key`; `id` is that of the upload."""
        with self._errors():
            pages = self._client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self.name, Prefix=self.prefix + key):
                for each in page.get("Uploads", ()):
                    yield ObjectVersion(each["Key"][len(self.prefix) :], each["UploadId"], 0, each["Initiated"])

    def _again(self, read: Callable[[], T]) -> T:
        """Call `read`, which boto3 does not repeat if the connection breaks while the body is read."""
        with self._errors():
            from botocore.exceptions import HTTPClientError

            for _ in range(_ATTEMPTS - 1):
                with suppress(HTTPClientError):
                    return read()
            return read()

    @property
    def _client(self) -> Any:
        return _client_for(*(os.environ.get(name, "") for name in (*_ENVIRONMENT, *_SECRETS)))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise errors of boto3 as one line that names the URL."""
        with needs_extra("s3", f"{self.url} (object storage)"):
            from botocore import exceptions
        try:
            yield
        except exceptions.ClientError as error:
            code = _code(error)
            if code in ("NoSuchKey", "NoSuchVersion", "InvalidRange", "404", "416"):
                raise MissingObjectError(f"{self.url}: no such object or range ({code})") from error
            if code == "NoSuchBucket":
                raise BucketError(f"{self.url}: no such bucket; create it, or correct the URL") from error
            if code in _DENIED:
                raise BucketError(f"{self.url}: access denied ({code}); check the AWS_* credentials") from error
            busy = code in _BUSY or error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500
            raise (UnavailableError if busy else StoreError)(f"{self.url}: {error}") from error
        except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.ProfileNotFound) as error:
            raise BucketError(f"{self.url}: no credentials ({error}); set AWS_ACCESS_KEY_ID and the like") from error
        except (exceptions.ParamValidationError, ValueError) as error:
            raise BucketError(f"{self.url}: cannot be used: {' '.join(str(error).split())}") from error
        except exceptions.BotoCoreError as error:
            raise UnavailableError(f"{self.url}: {error}") from error


@contextmanager
def _conflicts() -> Iterator[list[str]]:
    """Yield a list; the code of a failed If-None-Match inside the block is put into it instead of being raised."""
    from botocore.exceptions import ClientError

    conflict = list[str]()
    try:
        yield conflict
    except ClientError as error:
        if _code(error) not in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
            raise
        conflict.append(_code(error))


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@lru_cache(maxsize=4)
def _client_for(*environment: str) -> Any:
    """Return the process's client for these values of the environment; making one takes half a second."""
    import boto3
    from botocore.config import Config

    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    config = Config(
        retries={"mode": "standard", "max_attempts": _ATTEMPTS},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=16,
        # Checksums that not all S3-compatible servers know; adapters have their own.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    session = boto3.session.Session()
    return session.client("s3", region_name=region or session.region_name or "us-east-1", config=config)
