"""Objects in a bucket: conditional and multipart puts, retries, the cache in front, settings and their errors."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from proper.adapters import bucket as buckets
from proper.adapters import store as stores
from proper.adapters.bucket import Bucket, BucketError, MissingObjectError
from proper.adapters.integrity import check
from proper.adapters.storage_setting import parse_url, record, setting_of
from proper.adapters.store import AdapterStore, UserRecord
from proper.adapters.store_urls import check_store
from proper.cli.app import main
from proper.errors import InputError, StoreError, UnavailableError
from tests.s3_server import S3Server

Draw = Callable[[int], dict[str, Tensor]]


def test_only_one_of_two_writers_writes(s3: S3Server) -> None:
    bucket, wrote = Bucket(s3.new_bucket(), "p/"), list[bytes]()

    def write(data: bytes) -> None:
        if bucket.put_new("1.shard", data):
            wrote.append(data)

    threads = [threading.Thread(target=write, args=(bytes([at]) * 100,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrote) == 1 and bucket.read("1.shard", 0, 100) == wrote[0]


def test_a_large_object_goes_in_parts_and_refuses_a_second_writer(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "PART_BYTES", 5 << 20)  # the least that S3 takes
    bucket, data = Bucket(s3.new_bucket(), ""), bytes(range(256)) * (48 << 10)
    assert bucket.put_new("big", data) and not bucket.put_new("big", data[::-1])
    assert bucket.read("big", 0, len(data)) == data and bucket.read("big", 5, 3) == data[5:8]
    assert list(bucket.uploads()) == [], "the parts of the refused one are gone"
    with pytest.raises(MissingObjectError):
        bucket.read("big", len(data) - 1, 2)
    with pytest.raises(MissingObjectError):
        bucket.read("none", 0, 2)


class Broken:
    """A TCP proxy to an S3 server: of each pair of connections it cuts the first, after a request's answer arrived.

    With `deaf`, it cuts none, but the server does not see conditions of puts.
    """

    def __init__(self, url: str, deaf: bool = False) -> None:
        host, port = url.rpartition("/")[2].split(":")
        self.target, self.cut, self.deaf = (host, int(port)), 0, deaf
        self.socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def _serve(self) -> None:
        for number in range(100):
            try:
                client, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(client, number % 2 == 0 and not self.deaf), daemon=True).start()

    def _relay(self, client: socket.socket, cuts: bool) -> None:
        with client, socket.create_connection(self.target) as server:
            while True:
                for source in select.select([client, server], [], [])[0]:
                    data = source.recv(1 << 16)
                    if source is server and cuts and not data.startswith(b"HTTP/1.1 100"):
                        self.cut += 1
                        return
                    if not data:
                        return
                    if self.deaf:
                        data = data.replace(b"If-None-Match: *\r\n", b"")
                    (server if source is client else client).sendall(data)


def test_a_put_whose_answer_was_lost_is_repeated_and_knows_its_own_object(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, broken = Bucket(s3.new_bucket(), "p/"), Broken(s3.environment["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", broken.url)
    assert bucket.put_new("1.shard", b"adapters")
    assert broken.cut >= 1
    broken.socket.close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.environment["AWS_ENDPOINT_URL"])
    assert bucket.read("1.shard", 0, 8) == b"adapters" and not bucket.put_new("1.shard", b"another")


@pytest.fixture
def run(tmp_path: Path, s3: S3Server) -> tuple[Path, str]:
    """A run folder with a setting, and the name of its bucket."""
    folder, bucket = tmp_path / "run", s3.new_bucket()
    folder.mkdir()
    record(folder, f"s3://{bucket}/people?cache_mb=1")
    return folder, bucket


def test_a_second_read_needs_no_bucket_and_damage_in_the_cache_does_no_harm(
    run: tuple[Path, str], adapter: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = run
    with closing(AdapterStore(folder / "users")) as store:
        store.put(UserRecord(f"u{at}", "users", torch.ones(1), adapter(at)) for at in range(2))
        store.get("u0")
        with monkeypatch.context() as away:
            away.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
            found = store.get("u0")
            assert found is not None and found.adapter is not None
        (cached,) = (path for path in store.paths.cache.iterdir() if path.name != "size")
        cached.write_bytes(b"#" * cached.stat().st_size)
        found = store.get("u0")
        assert found is not None and found.adapter is not None
        assert all(torch.equal(found.adapter[name], tensor) for name, tensor in adapter(0).items())
        assert b"###" not in cached.read_bytes(), "replaced by the right bytes"
        cached.write_bytes(b"torn")
        assert store.get("u0") is not None


def test_damage_in_the_bucket_is_found_and_repaired(run: tuple[Path, str], s3: S3Server, adapter: Draw) -> None:
    folder, bucket = run
    with closing(AdapterStore(folder / "users")) as store:
        store.put([UserRecord("u0", "users", torch.ones(1), adapter(0))])
        store.put([UserRecord("u0", "users", torch.ones(1), adapter(1))])
        data = s3.client.get_object(Bucket=bucket, Key="people/users/2.shard")["Body"].read()
        s3.client.put_object(Bucket=bucket, Key="people/users/2.shard", Body=b"\xff" + data[1:])
        with pytest.raises(StoreError, match="s3://.*2.shard: the adapter of user 'u0' is missing or damaged"):
            store.get("u0")
        assert [each.kind for each in check(store)] == ["flipped"]
        repaired = check(store, repair=True)
        assert repaired[0].repair == "went back to version 1" and check(store) == []
        s3.client.delete_object(Bucket=bucket, Key="people/users/1.shard")
        assert {each.kind for each in check(store)} == {"missing"}


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("SlowDown", 503, UnavailableError),
        ("InternalError", 500, UnavailableError),
        ("AccessDenied", 403, BucketError),
        ("EntityTooLarge", 400, StoreError),
    ],
)
def test_a_server_that_is_busy_is_not_one_that_refuses(code: str, status: int, kind: type[StoreError]) -> None:
    from botocore.exceptions import ClientError

    answer: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    with pytest.raises(StoreError) as raised, Bucket("b", "")._errors():
        raise ClientError(answer, "PutObject")
    assert raised.type is kind


def test_old_versions_wait_until_a_rewrite_pays(run: tuple[Path, str], adapter: Draw, s3: S3Server) -> None:
    folder, bucket = run
    with closing(AdapterStore(folder / "users", keep=1)) as store:
        store.put(UserRecord(f"u{at}", "users", torch.ones(1), adapter(at)) for at in range(8))
        store.put([UserRecord("u0", "users", torch.ones(1), adapter(20))])
        assert "people/users/1.shard?null" in s3.contents(bucket) and len(store.manifest.erasures()) == 1
        assert check(store) == [] and len(store.manifest.erasures()) == 1, "a check has no need of it"
        store.delete("u7")
        assert store.manifest.erasures() == [] and "people/users/1.shard?null" not in s3.contents(bucket)
        for at in (1, 2, 3):
            store.put([UserRecord(f"u{at}", "users", torch.ones(1), adapter(20 + at))])
        assert len(store.manifest.erasures()) <= 1


def test_a_failed_put_leaves_nothing_to_the_next_one(
    run: tuple[Path, str], adapter: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> int:
        raise StoreError("the manifest is away")

    with closing(AdapterStore(run[0] / "users")) as store:
        with monkeypatch.context() as broken:
            broken.setattr(stores, "commit", away)
            broken.setattr(type(store.manifest), "shard_size", away)
            with pytest.raises(StoreError, match="is away"):
                store.put([UserRecord("ann", "users", torch.ones(1), adapter(1))])
        store.put([UserRecord("bob", "users", torch.ones(1), adapter(2))])
        assert check(store) == []


def test_a_bucket_that_removes_nothing_undoes_no_commit(
    run: tuple[Path, str],
    adapter: Draw,
    s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, bucket = run

    def put(store: AdapterStore, seed: int) -> None:
        store.put([UserRecord("ann", "users", torch.ones(1), adapter(seed))])

    def refuse(self: Bucket, key: str) -> None:
        raise StoreError(f"{key}: not now")

    with closing(AdapterStore(folder / "users", keep=1)) as store:
        put(store, 1)
        with monkeypatch.context() as broken:
            broken.setattr(Bucket, "remove", refuse)
            put(store, 2)
            with closing(AdapterStore(folder / "users", keep=2)) as opened:
                put(opened, 3)
                assert opened.rollback("ann") == 4, "a client that saw an error would roll back once more"
            with pytest.raises(StoreError, match="not now"):
                store.delete("bob")
        assert "1.shard: not now" in caplog.text and "people/users/1.shard?null" in s3.contents(bucket)
        head = store.head("ann")
        assert head is not None and head.version == 4
        put(store, 5)
        assert store.manifest.erasures() == [] and len(s3.contents(bucket)) == 2, "the owner and one object"


def test_a_deletion_rewrites_the_objects_with_bytes_of_the_user_only(
    run: tuple[Path, str], adapter: Draw, s3: S3Server
) -> None:
    folder, bucket = run
    with closing(AdapterStore(folder / "users", keep=1)) as store:
        for first in (0, 8, 16):
            store.put(UserRecord(f"u{first + at}", "users", torch.ones(1), adapter(at)) for at in range(8))
        for user in ("u0", "u8"):  # each leaves a replaced version in its object
            store.put([UserRecord(user, "users", torch.ones(1), adapter(20))])
        before = set(s3.contents(bucket))
        store.delete("u0")
        gone = {each.partition("/users/")[2] for each in before - set(s3.contents(bucket))}
        assert gone == {"1.shard?null", "4.shard?null"}, "the replaced version of the user as well, and no other object"
        assert [each.blob for each in store.manifest.erasures()] == ["2.shard"]
        assert {user for user, _ in store.users()} == {f"u{at}" for at in range(1, 24)}
        assert all(store.get(user) is not None for user, _ in store.users())


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("gs://b/p", "not a URL like s3://BUCKET/PREFIX"),
        ("s3:///p", "not a URL like"),
        ("s3://b/p?cache=1", "not a URL like"),
        ("s3://b/p?cache_mb=all", "cache_mb is not a number of MiB"),
        ("s3://key:secret@b/p", "has credentials in the URL"),
        ("s3://[b/p", "Invalid IPv6 URL; write s3://BUCKET/PREFIX"),
    ],
)
def test_urls_that_cannot_be(url: str, why: str) -> None:
    with pytest.raises(InputError, match=why) as error:
        parse_url(url, "")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        (
            "foo://key:secret@x",
            r"--store foo://\.\.\.: neither s3://BUCKET/PREFIX .* nor postgresql://USER@HOST/DATAB",
        ),
        ("runs/notes", "--store runs/notes: neither s3://.* nor postgresql://.* in the run folder"),
        ("gs://b/p", r"--store gs://\.\.\.: neither s3://"),
        ("postgres://h/d", "--store postgres://h/d: not the URL of a PostgreSQL database"),
        ("s3:///p", "--store s3:///p: not a URL like s3://"),
    ],
)
def test_the_kinds_of_urls_are_named(url: str, why: str) -> None:
    with pytest.raises(InputError, match=why) as error:
        check_store(url)
    assert "secret" not in str(error.value)


def test_a_run_keeps_its_setting_and_its_prefix(run: tuple[Path, str], tmp_path: Path, adapter: Draw) -> None:
    folder, bucket = run
    record(folder, f"s3://{bucket}/people/?cache_mb=7")
    setting = setting_of(folder)
    assert setting is not None and setting.cache_mb == 7
    with pytest.raises(InputError, match=f"keeps its adapters in s3://{bucket}/people"):
        record(folder, f"s3://{bucket}/other")
    (tmp_path / "second").mkdir()
    with pytest.raises(StoreError, match="holds the adapters of another run"):
        record(tmp_path / "second", f"s3://{bucket}/people")
    with closing(AdapterStore(tmp_path / "third" / "users")) as store:
        store.put([UserRecord("u0", "users", torch.ones(1), adapter(0))])
    with pytest.raises(InputError, match="this run keeps its adapters in .*blobs"):
        record(tmp_path / "third", f"s3://{bucket}/third")


def test_a_server_that_does_not_know_conditions_is_refused_and_nothing_is_overwritten(
    run: tuple[Path, str], tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, bucket = run
    before = s3.contents(bucket)
    deaf = Broken(s3.environment["AWS_ENDPOINT_URL"], deaf=True)
    monkeypatch.setenv("AWS_ENDPOINT_URL", deaf.url)
    for prefix, why in (("people", "holds the adapters of another run"), ("new", "in spite of If-None-Match")):
        with pytest.raises(BucketError, match=why):
            record(tmp_path / "second", f"s3://{bucket}/{prefix}")
    deaf.socket.close()
    assert s3.contents(bucket) == before and not (tmp_path / "second").exists()


def test_stores_of_nested_runs_have_prefixes_of_their_own(run: tuple[Path, str], s3: S3Server, adapter: Draw) -> None:
    folder, bucket = run
    (folder / "config.yaml").touch()  # only a run has nested runs
    for users in (folder / "users", folder / "seeds" / "1" / "users", folder / "users" / "work" / "trial"):
        with closing(AdapterStore(users)) as store:
            store.put([UserRecord("u0", "users", torch.ones(1), adapter(0))])
    keys = {name.partition("?")[0] for name in s3.contents(bucket)}
    assert keys == {"people/owner", "people/users/1.shard", "people/seeds/1/users/1.shard"}
    assert (folder / "users" / "work" / "trial" / "blobs" / "1.shard").exists(), "a temporary store is local"


def test_a_wrong_bucket_or_no_credentials_is_one_line(
    s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text("data: {path: x}\n")
    call = ["run", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run"), "--store", "s3://no-such-bucket/p"]
    assert main(call) == 2
    assert capsys.readouterr().err == "proper: s3://no-such-bucket/p/: no such bucket; create it, or correct the URL\n"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(BucketError, match="no credentials .*AWS_ACCESS_KEY_ID") as error:
        record(tmp_path / "run", "s3://no-such-bucket/p")
    assert error.value.exit_code == 2 and "\n" not in str(error.value)
