"""A soak of `proper serve`: mixed traffic and faults, and in the end nothing lost and nobody answered as somebody else.

    python tests/soak RUN --seconds 600 --seed 3
    python tests/soak RUN --seconds 600 --disk /mnt/small     a small disk of its own, which is filled

RUN is a run folder with all three stages. Users of a copy of it are taught a code word each by the project's own fits,
and that each says it is checked offline first. Prints what happened as JSON; exits with 1 if anything is wrong, and
says what, with the seed and the faults. Every draw is the seed's; what meets what is the machine's.
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

import spoiled
import verdict
from beside import Beside, Imports
from crowd import Crowd
from faults import Saboteur
from folk import LENGTHS, Archive, labels_of, offline, prepare, says
from ledger import Ledger
from scene import Scene
from server import Server, memory
from traffic import Client

from proper.errors import StoreError

ROWS, SLOTS = 6, 4
"""More users than slots, so that adapters come and go."""


def main() -> int:
    """Run it all; return the exit code."""
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
        lines = [f"soak: seed {asked.seed}, {asked.seconds:g} s:", *verdict.grouped(wrong), "done:"]
        print("\n".join([*lines, *(f"{at:8.2f} s  {what}" for at, what in ledger.done)]), file=sys.stderr)
    return int(bool(wrong))


def soak(
    run: Path, scratch: Path, folder: Path, seconds: float, seed: int, askers: int
) -> tuple[Ledger, dict[str, Any], list[str]]:
    """Prepare, run and judge; return all notes, a summary, and what is wrong."""
    pristine = scratch / "pristine" / "run"
    people = prepare(run, pristine)
    archive = Archive(pristine / "users")
    archive.look()
    archive.close()
    before = offline(
        pristine, scratch / "first" / "run", archive.records, [(u, 1, "users", n) for u in people for n in LENGTHS]
    )
    for (user, *_), text in before.items():
        if not says(text, people[str(user)]):
            return Ledger(), {}, [f"{user} was not taught the code word: {text!r}"]
    shutil.copytree(pristine, folder)
    spoiled.export(pristine, next(iter(people)), scratch / "exports")
    hidden = verdict.hidden(folder)
    server, archive = Server(folder, ROWS, SLOTS, *deadlines()), Archive(folder / "users")
    archive.look()
    idle: list[socket.socket] = []
    samples: list[tuple[float, int, int]] = []
    server.start()
    ledger = Ledger()
    try:
        scene = Scene(server, folder, scratch / "exports", people, archive, ledger, threading.Event(), Random(seed))
        threads = begin(scene, idle, seed, seconds, askers, samples)
        for thread in threads:
            thread.join()
        wrong = verdict.at_rest(server)
        last = Client("last", server.url, folder.name, people, ledger, threading.Event(), Random(seed))
        for user in (*people, *(guest for guest in ledger.guests if guest not in ledger.deleted), None):
            last.whole(user, max(LENGTHS))
        wrong += verdict.at_rest(server)
        wrong += verdict.idle_closed(idle) + verdict.settled(folder, ledger)
        archive.look()
        server.stop()
    finally:
        with suppress(ProcessLookupError):
            server.kill()
    if server.ended != [0]:
        wrong.append(f"the server ended with {server.ended} after SIGTERM")
    wrong += ledger.wrong
    archive.close()
    wrong += verdict.nothing_lost(folder, ledger)
    wrong += verdict.nothing_left(folder, ledger, hidden)
    wrong += verdict.nobody_elses(pristine, scratch / "judged" / "run", archive, ledger, people)
    wrong += verdict.refused_rightly(ledger) + verdict.bounded(samples)
    wrong += verdict.enough_done(ledger, archive, people)
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
        threading.Thread(target=Saboteur(apart("faults")).run, name="saboteur"),
        threading.Thread(target=Beside(apart("beside")).run, name="beside"),
        threading.Thread(target=Crowd(apart("crowd"), idle, Imports(apart("imports"))).run, name="crowd"),
    ]

    def client(name: str, step: str) -> threading.Thread:
        one = Client(name, server.url, scene.folder.name, scene.people, ledger, stop, Random(f"{seed} {name}"))
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
    """Return what happened in numbers."""
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
