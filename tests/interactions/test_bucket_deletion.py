"""Deletion and its verification in a run whose adapters are in a versioned bucket."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from proper.adapters.storage_setting import record
from proper.adapters.store import AdapterStore, UserRecord
from proper.cli.app import main
from proper.databases.setup import keep_state
from proper.interactions.deletion import finish_deletions, remove
from proper.interactions.log import InteractionLog
from proper.interactions.verification import fingerprint, verify
from proper.serving.deletion_watch import DeletionWatch
from tests.s3_server import S3Server

USER, SALT = "anna-17", bytes(range(32))
DRAW = torch.Generator().manual_seed(3)
ADAPTERS = {user: {"x.A": torch.randn(8, 300, generator=DRAW)} for user in (USER, "bo", "cy")}


class Fixture:
    """A run folder, its bucket, and the prints of USER."""

    def __init__(self, folder: Path, server: S3Server) -> None:
        self.folder, self.server, self.bucket = folder, server, server.new_bucket(versioned=True)
        folder.mkdir()
        (folder / "config.yaml").write_text("data: {path: x}\n")
        record(folder, f"s3://{self.bucket}/run")
        with closing(AdapterStore(folder / "users")) as store, closing(InteractionLog(folder / "users")) as log:
            store.put(UserRecord(user, "users", torch.ones(4), adapter) for user, adapter in ADAPTERS.items())
            self.prints = fingerprint(store, log, USER, SALT)

    def verified(self) -> tuple[dict[str, object], bool]:
        done = verify(self.folder, [(USER, self.prints)])
        return done.certificate, done.clean

    def delete(self) -> tuple[str, ...]:
        with (
            closing(AdapterStore(self.folder / "users")) as store,
            closing(InteractionLog(self.folder / "users")) as log,
        ):
            return remove(store, log, USER).waits


@pytest.fixture
def run(tmp_path: Path, s3: S3Server) -> Fixture:
    return Fixture(tmp_path / "run", s3)


def found_in(certificate: dict[str, object]) -> set[str]:
    (user,) = certificate["users"]  # type: ignore[misc]
    return {each["file"] for each in user["found"] if each["kind"] == "tensor"}


def test_the_search_reads_objects_and_the_cache_and_finds_nothing_after_a_deletion(run: Fixture) -> None:
    before, clean = run.verified()
    kinds = {name.partition(":")[0].partition("/")[0] for name in found_in(before)}
    assert not clean and kinds == {"s3", "users"}, "an object, and a file of the cache"
    assert run.delete() == ()
    after, clean = run.verified()
    assert clean and after["object_storage"] == {
        "url": f"s3://{run.bucket}/run/",
        "versioned": True,
        "versions": 2,
        "delete_markers": 0,
        "unfinished_uploads": 0,
    }
    not_covered = " ".join(after["not_covered"])  # type: ignore[call-overload]
    assert "copies of the bucket" in not_covered and "unfinished uploads, if the server lists them only" in not_covered
    with closing(AdapterStore(run.folder / "users")) as store:
        for user in ("bo", "cy"):
            kept = store.get(user)
            assert kept is not None and kept.adapter is not None
            assert torch.equal(kept.adapter["x.A"], ADAPTERS[user]["x.A"])


def test_the_cache_of_another_machine_is_not_served_and_swept(tmp_path: Path, s3: S3Server, postgresql: str) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    keep_state(here, postgresql)
    record(here, f"s3://{s3.new_bucket()}/run")
    shutil.copytree(here, there)
    with closing(AdapterStore(here / "users")) as mine, closing(AdapterStore(there / "users")) as theirs:
        mine.put(UserRecord(user, "users", torch.ones(4), adapter) for user, adapter in ADAPTERS.items())
        for store in (mine, theirs):
            assert all(store.get(user) is not None for user in ADAPTERS)
        mine.delete(USER)
        bytes_of = ADAPTERS[USER]["x.A"].numpy().tobytes()[:64]
        held = [path for path in there.rglob("*@*") if bytes_of in path.read_bytes()]
        assert theirs.get(USER) is None and len(held) == 1
        with held[0].open("rb") as opened:
            engine: Any = SimpleNamespace(recheck=lambda: None)  # the watch asks nothing else of it
            watch = DeletionWatch(engine, there / "users", pytest.fail)
            watch.start()
            deadline = time.monotonic() + 30
            while held[0].exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            watch.stop()
            assert not any(opened.read()), "zeroed before it was removed"
        assert not held[0].exists() and bytes_of not in b"".join(path.read_bytes() for path in there.rglob("*@*"))
        assert theirs.get("bo") is not None
        cached = list(there.rglob("*@*"))
        theirs.shards.sweep()
        assert cached and list(there.rglob("*@*")) == cached, "what the bucket has stays"


def test_an_old_version_and_an_unfinished_upload_are_found(run: Fixture) -> None:
    assert run.delete() == ()
    secret = ADAPTERS[USER]["x.A"].numpy().tobytes()
    run.server.client.put_object(Bucket=run.bucket, Key="run/users/7.shard", Body=b"#" * 33 + secret)
    run.server.client.delete_object(Bucket=run.bucket, Key="run/users/7.shard")
    certificate, clean = run.verified()
    (name,) = found_in(certificate)
    assert not clean and name.startswith(f"s3://{run.bucket}/run/users/7.shard?versionId=")

    again = Fixture(run.folder.with_name("again"), run.server)
    assert again.delete() == ()
    again.server.client.create_multipart_upload(Bucket=again.bucket, Key="run/users/8.shard")
    certificate, clean = again.verified()
    assert not clean and certificate["result"] == "not all files could be read"
    assert [each["file"] for each in certificate["unreadable"]] == [f"s3://{again.bucket}/run/users/8.shard"]  # type: ignore[attr-defined]


def test_a_deletion_waits_for_the_bucket_and_goes_on(run: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as away:
        away.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        (why,) = run.delete()
        assert why.startswith(f"s3://{run.bucket}/run/") and "Could not connect" in why
    assert finish_deletions(run.folder / "users") == []
    assert run.verified()[1]


def test_the_commands_follow_the_run(run: Fixture, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["users", "list", str(run.folder)]) == 0
    assert USER in capsys.readouterr().out
    assert main(["users", "check", str(run.folder)]) == 0
    prints = tmp_path / "prints"
    assert main(["users", "delete", str(run.folder), "--user", USER, "--fingerprints", str(prints)]) == 0
    told = tmp_path / "certificate.json"
    call = ["users", "verify-deleted", str(run.folder), "--user", USER, "--fingerprints", str(prints)]
    assert main([*call, "--json", str(told)]) == 0
    assert json.loads(told.read_text())["object_storage"]["versioned"] is True
    run.server.client.put_object(Bucket=run.bucket, Key="run/users/9.shard", Body=b"whose?")
    capsys.readouterr()
    assert main(["users", "check", str(run.folder)]) == 1
    said = capsys.readouterr()
    assert f"s3://{run.bucket}/run/users/9.shard: 6 bytes that no record refers to" in said.out + said.err
    assert main(["users", "check", str(run.folder), "--repair"]) == 0
    assert main(["users", "check", str(run.folder)]) == 0
