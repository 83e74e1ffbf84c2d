"""Faults by other processes: damaged imports, deletions by the command line, held locks.

A non-finite adapter arrives in two ways: as an exported user, and as bytes in the store whose checksum is right.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random

import httpx
import xxhash
from clients import Client, lesson, path_of
from damaged_exports import KINDS
from scene import Scene
from soak_users import GUESTS, LENGTHS, PROMPT

from proper.adapters.manifest import key_of
from proper.adapters.store import AdapterStore
from proper.errors import ProperError, StoreError
from proper.export.run_export import import_user

HEALTH_SECONDS = 3.0
"""Within which /healthz answers while a lock is held; some milliseconds where the machine is free."""
FORGET_SECONDS = 3.0
"""Within which a server sees that a user was deleted beside it."""
TRIES = 4
"""At something that only counts with a server there; it may be killed meanwhile."""
REFUSALS = ("numbers that are not finite", "numbers beyond")
"""What the command line says of a spoiled export."""
HOLD = """
import sqlite3, sys, time
database = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)
database.execute("BEGIN IMMEDIATE")
print("held", flush=True)
time.sleep(float(sys.argv[2]))
database.execute("ROLLBACK")
"""


@dataclass
class Imports:
    """Spoiled exports, one kind after another."""

    scene: Scene
    kinds: list[str] = field(default_factory=lambda: [*KINDS])

    def import_spoiled(self) -> None:
        """Import an exported user with numbers that are no numbers, or absurd; it must be refused."""
        kind = self.kinds.pop(0)
        self.kinds.append(kind)
        user = f"import {kind}-{self.scene.marker()}"
        ended = self.scene.proper(
            "users", "import", str(self.scene.folder), str(self.scene.exports / kind), "--user", user
        )
        self.scene.ledger.deleted.add(user)
        said = _own_lines(ended.stderr)
        if ended.returncode not in (1, 2) or len(said) != 1 or not any(why in said[0] for why in REFUSALS):
            self.scene.ledger.amiss(f"import of {kind} ended with {ended.returncode}: {ended.stdout} {ended.stderr}")
        self.scene.ledger.fault(f"import tried: {kind}")


@dataclass
class ProcessFaults:
    """Faults in the run folder that other processes cause."""

    scene: Scene
    client: Client = field(init=False)

    def __post_init__(self) -> None:
        scene = self.scene
        self.client = Client(
            "beside", scene.server.url, scene.folder.name, scene.words, scene.ledger, threading.Event(), Random(0)
        )

    def run(self) -> None:
        """Go through all of them until the scene's end."""
        steps = [self.spoil_slot, self.delete_by_cli, self.hold_locks]
        with closing(self.client.http):
            self.scene.go_through("what is beside the server", lambda number: steps)

    def spoil_slot(self) -> None:
        """Fill a stored adapter with NaN, with the checksum of that; its user falls back or is refused."""
        scene, user = self.scene, f"spoiled slot-{self.scene.marker()}"
        with closing(AdapterStore(scene.folder / "users")) as store:
            record = scene.archive.records[next(iter(scene.words)), 1]
            try:
                store.put([replace(record, user=user)])
                _fill_with_nan(store, user)
            except ProperError as error:  # the disk is full just now
                scene.ledger.fault(f"no slot spoiled: {error}")
        replies = 0
        for _ in range(TRIES):
            scene.await_server()
            body = {"model": scene.folder.name, "prompt": PROMPT, "max_tokens": max(LENGTHS), "user": user}
            try:
                reply = self.client.http.post("/v1/completions", json=body)
            except httpx.TransportError:
                continue
            replies += 1
            if reply.status_code == 200 and reply.json()["proper"]["tier"] == "users":
                scene.ledger.amiss(f"{user} is answered by an adapter of NaN: {reply.text}")
        self.client.delete(user)
        scene.ledger.fault("slot spoiled" if replies else "slot spoiled unseen")

    def delete_by_cli(self) -> None:
        """Enrol one user, import another, and delete both by the command line while the server knows them."""
        scene = self.scene
        enrolled, imported = f"cli guest-{scene.marker()}", f"cli import-{scene.marker()}"
        self._enrol(enrolled)
        source = scene.words[next(iter(scene.words))]
        scene.ledger.guests[imported] = source
        try:
            import_user(scene.folder, scene.exports / "good", name=imported)
        except StoreError as error:  # the disk is full just now
            self._delete(enrolled)
            scene.ledger.fault(f"not imported: {error}")
            return
        scene.wait(lambda: (imported, 1) in scene.archive.records, 5)
        self.client.whole(imported, LENGTHS[1])
        self._delete(enrolled, imported)
        for user in (enrolled, imported):
            if not self._forgets(user):
                scene.ledger.amiss(f"{user} was deleted beside the server and is known to it")
        scene.ledger.fault("deleted by the command line")

    def _enrol(self, user: str) -> None:
        """Enrol a user whose texts and ids hold the marker; wait until they are fitted."""
        scene, ledger, marker = self.scene, self.scene.ledger, user.rpartition("-")[2]
        word, ids = GUESTS[-1], [f"a-{marker}", f"b-{marker}"]
        body = lesson(word, ids, marker)
        for one in body["interactions"]:
            ledger.sent[user, one["id"]] = one["output"]
        reply, again = self.client.insist("enrol", "POST", "/v1/users", {"user": user, **body})
        if reply is None or not (reply.is_success or (again and reply.status_code == 409)):
            raise RuntimeError(f"{user} could not be enrolled: {reply and reply.text}")
        ledger.acknowledged |= {(user, one) for one in ids}
        ledger.guests[user] = word
        scene.wait(lambda: (user, 1) in scene.archive.records, 10)

    def _delete(self, *users: str) -> None:
        """Delete by the command line, once more where it could not be done; exit code 2 then: they are gone."""
        self.scene.ledger.deleted |= {*users}
        words = [word for user in users for word in ("--user", user)]
        for again in range(5):
            ended = self.scene.proper("users", "delete", str(self.scene.folder), *words)
            if ended.returncode == 0 or (ended.returncode == 2 and again):
                return
            self.scene.ledger.fault(f"deletion waits: {ended.stderr.strip()}")
            time.sleep(1)
        self.scene.ledger.amiss(f"{users} could not be deleted: {ended.stderr}")

    def _forgets(self, user: str) -> bool:
        """Whether the server forgets a user within `FORGET_SECONDS` in which it runs."""
        while True:
            self.scene.await_server()
            starts = self.scene.server.starts
            if self.scene.wait(partial(self._is_forgotten, user), FORGET_SECONDS):
                return True
            if self.scene.server.starts == starts and self.scene.server_is_up():
                return False

    def _is_forgotten(self, user: str) -> bool:
        answer = self.client.whole(user, LENGTHS[0])
        card = self.client.send("read", "GET", f"/v1/users/{path_of(user)}")
        return answer is not None and answer.tier == "none" and card is not None and card.status_code == 404

    def hold_locks(self) -> None:
        """Another process holds the write lock of the log, then that of the store; /healthz goes on answering."""
        for name in ("interactions.sqlite", "users.sqlite"):
            any(self._hold_lock(name) for _ in range(TRIES))

    def _hold_lock(self, name: str) -> bool:
        """Have a lock held for some seconds; return whether the server was there to meet it."""
        scene = self.scene
        path, seconds, worst = scene.folder / "users" / name, scene.random.uniform(1, 4), 0.0
        command = [sys.executable, "-c", HOLD, str(path), str(seconds)]
        scene.await_server()
        starts = scene.server.starts
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ}) as holder:
            assert holder.stdout is not None
            held = holder.stdout.readline()
            while holder.poll() is None:
                worst = max(worst, self._health())
                time.sleep(0.1)
        if not held or holder.returncode or not worst or scene.server.starts != starts or not scene.server_is_up():
            scene.ledger.fault(f"no lock held: {name}")
            return False
        scene.ledger.fault(f"lock held: {name}, {seconds:.1f} s, /healthz within {worst:.2f} s")
        if worst > HEALTH_SECONDS:
            scene.ledger.amiss(f"/healthz took {worst:.2f} s while {name} was locked")
        return True

    def _health(self) -> float:
        """Return the seconds that a reply took; 0 where there is no server just now."""
        began = time.monotonic()
        try:
            httpx.get(f"{self.scene.server.url}/healthz", timeout=60)
        except httpx.TransportError:
            return 0.0
        return time.monotonic() - began


def _own_lines(stderr: str) -> list[str]:
    """Return the lines that the command line wrote itself; libraries may warn before."""
    return [line for line in stderr.splitlines() if line.startswith("proper: ")]


def _fill_with_nan(store: AdapterStore, user: str) -> None:
    """Set every byte of an adapter to 0xFF, which is NaN in every float format, and its checksum to that of those."""
    row = store.manifest.head(store.tenant, key_of(user))
    assert row is not None and row.place is not None
    spoiled = b"\xff" * row.length
    file = os.open(store.paths.blobs / row.place.blob, os.O_RDWR)
    try:
        os.pwrite(file, spoiled, row.place.offset)
    finally:
        os.close(file)
    with store.manifest.transaction():
        store.manifest.write(
            "UPDATE records SET xxh3 = ? WHERE tenant = ? AND user = ?",
            (xxhash.xxh3_64_digest(spoiled), store.tenant, key_of(user)),
        )
