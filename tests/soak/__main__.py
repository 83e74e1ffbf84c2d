"""Soak test of `proper serve`: mixed traffic and faults; no data may be lost, and no user may get another's answer.

    python tests/soak RUN --seconds 600 --seed 3
    python tests/soak RUN --seconds 600 --disk /mnt/small     a small disk of its own, which is filled

RUN is a run folder with all three stages. In a copy of it, new users are fitted to a code word each, and an offline
check confirms that each user's answer contains it. Prints a summary as JSON. If a condition fails, prints the failures,
the seed and the faults, and exits with 1. All random draws come from the seed; the timing depends on the machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import conditions
import damaged_exports
from client_faults import ClientFaults
from clients import Client
from ledger import Ledger
from process_faults import Imports, ProcessFaults
from scene import Scene
from server import Server, memory
from server_faults import ServerFaults
from soak_users import LENGTHS, Archive, labels_of, offline, prepare, says

from proper.errors import StoreError

ROWS, SLOTS = 6, 4
"""More users than slots, so that adapters are evicted and loaded again."""


def main() -> int:
    """Run the soak test; return the exit code."""
    parser = argparse.ArgumentParser(prog="soak", description="Mixed traffic and faults for proper serve.")
    parser.add_argument("run", type=Path, help="a run folder with all three stages; it is copied")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--askers", type=int, default=5, help="clients that ask without a pause")
    parser.add_argument("--disk", type=Path, help="where the copy lies; a mount point is filled to make its disk full")
    asked = parser.parse_args()
    if labels_of(asked.run):
        print(f"soak: {asked.run}: the run has task.labels and cannot answer with a code word", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="proper-soak-", ignore_cleanup_errors=True) as scratch:
        home = asked.disk or Path(scratch)
        ledger, told, wrong = soak(asked.run, Path(scratch), home / "run", asked.seconds, asked.seed, asked.askers)
    print(json.dumps(told, indent=2))
    if wrong:
        lines = [f"soak: seed {asked.seed}, {asked.seconds:g} s:", *conditions.grouped(wrong), "done:"]
        print("\n".join([*lines, *(f"{at:8.2f} s  {what}" for at, what in ledger.done)]), file=sys.stderr)
    return int(bool(wrong))


def soak(
    run: Path, scratch: Path, folder: Path, seconds: float, seed: int, askers: int
) -> tuple[Ledger, dict[str, Any], list[str]]:
    """Prepare, run and check; return the ledger, a summary, and the failures."""
    pristine = scratch / "pristine" / "run"
    words = prepare(run, pristine)
    archive = Archive(pristine / "users")
    archive.look()
    archive.close()
    before = offline(
        pristine, scratch / "first" / "run", archive.records, [(u, 1, "users", n) for u in words for n in LENGTHS]
    )
    for (user, *_), text in before.items():
        if not says(text, words[str(user)]):
            return Ledger(), {}, [f"{user} was not taught the code word: {text!r}"]
    shutil.copytree(pristine, folder)
    damaged_exports.export(pristine, next(iter(words)), scratch / "exports")
    hidden = conditions.hidden(folder)
    server, archive = Server(folder, ROWS, SLOTS, *deadlines()), Archive(folder / "users")
    archive.look()
    idle: list[socket.socket] = []
    samples: list[tuple[float, int, int]] = []
    server.start()
    ledger = Ledger()
    try:
        scene = Scene(server, folder, scratch / "exports", words, archive, ledger, threading.Event(), Random(seed))
        threads = begin(scene, idle, seed, seconds, askers, samples)
        for thread in threads:
            thread.join()
        wrong = conditions.at_rest(server)
        last = Client("last", server.url, folder.name, words, ledger, threading.Event(), Random(seed))
        for user in (*words, *(guest for guest in ledger.guests if guest not in ledger.deleted), None):
            last.whole(user, max(LENGTHS))
        wrong += conditions.at_rest(server)
        wrong += conditions.idle_closed(idle) + conditions.settled(folder, ledger)
        archive.look()
        server.stop()
    finally:
        with suppress(ProcessLookupError):
            server.kill()
    if server.ended != [0]:
        wrong.append(f"the server ended with {server.ended} after SIGTERM")
    wrong += ledger.wrong
    archive.close()
    wrong += conditions.nothing_lost(folder, ledger)
    wrong += conditions.nothing_left(folder, ledger, hidden)
    wrong += conditions.only_own_answers(pristine, scratch / "judged" / "run", archive, ledger, words)
    wrong += conditions.refused_rightly(ledger) + conditions.bounded(samples)
    wrong += conditions.enough_done(ledger, archive, words)
    if wrong:
        wrong.append("\n  ".join(["the server's last words:", *list(server.said)[-20:]]))
    return ledger, summary(ledger, archive, server, samples, seed), wrong


def deadlines() -> list[str]:
    """Return the options for short deadlines of connections, as far as this version has them."""
    told = subprocess.run([sys.executable, "-m", "proper", "serve", "--help"], capture_output=True, text=True).stdout
    wanted = {"--header-timeout": "5", "--body-timeout": "10", "--keep-alive": "10"}
    return [word for option, value in wanted.items() if option in told for word in (option, value)]


def begin(
    scene: Scene,
    idle: list[socket.socket],
    seed: int,
    seconds: float,
    askers: int,
    samples: list[tuple[float, int, int]],
) -> list[threading.Thread]:
    """Start all clients and faults; they end by themselves after `seconds`, the faults first."""
    server, ledger, archive, calm, stop = scene.server, scene.ledger, scene.archive, scene.stop, threading.Event()

    def apart(name: str) -> Scene:
        return replace(scene, random=Random(f"{seed} {name}"))

    faults = [
        threading.Thread(target=ServerFaults(apart("faults")).run, name="saboteur"),
        threading.Thread(target=ProcessFaults(apart("beside")).run, name="beside"),
        threading.Thread(target=ClientFaults(apart("crowd"), idle, Imports(apart("imports"))).run, name="crowd"),
    ]

    def client(name: str, step: str) -> threading.Thread:
        one = Client(name, server.url, scene.folder.name, scene.words, ledger, stop, Random(f"{seed} {name}"))
        return threading.Thread(target=one.run, args=(getattr(one, step),), name=name)

    def watch() -> None:
        while not stop.wait(0.1):
            with suppress(StoreError):  # the disk is full, and SQLite wants to write to read
                archive.look()
            if server.ready and (not samples or ledger.now - samples[-1][0] > 1):
                samples.append((ledger.now, server.pid, memory(server.pid)))

    def end() -> None:
        time.sleep(seconds)
        calm.set()
        for fault in faults:
            fault.join()
        time.sleep(1)  # some traffic after the last fault
        stop.set()

    steps = {
        **{f"asker-{at}": "ask" for at in range(askers)},
        "teacher-0": "teach",
        "teacher-1": "teach",
        "visitor": "visit",
    }
    threads = [*(client(name, step) for name, step in steps.items()), threading.Thread(target=watch, name="watch")]
    for thread in (*faults, *threads, closing := threading.Thread(target=end, name="end")):
        thread.start()
    return [*faults, *threads, closing]


def summary(ledger: Ledger, archive: Archive, server: Server, samples: list[tuple[float, int, int]], seed: int) -> Any:
    """Return a summary in numbers."""
    answers = ledger.answers
    return {
        "seed": seed,
        "seconds": round(ledger.now, 1),
        "answers": len(answers),
        "whole": sum(one.whole for one in answers),
        "fallbacks": sum(one.fallback is not None for one in answers),
        "tiers": Counter(one.tier for one in answers),
        "versions": len(archive.records),
        "acknowledged": len(ledger.acknowledged),
        "guests": len(ledger.guests),
        "deleted": len(ledger.deleted),
        "server_starts": server.starts,
        "faults": Counter(what.partition(":")[0] for _, what in ledger.done),
        "replies": dict(sorted(ledger.replies.items())),
        "memory_mib": [[round(at), pid, size >> 20] for at, pid, size in samples[:: max(1, len(samples) // 20)]],
    }


if __name__ == "__main__":
    sys.exit(main())
