"""Deletes a user again and again in processes of its own that are killed at random points; one JSON line for each.

    python killed_deletion.py FOLDER KILLS SEED

FOLDER has a run; every attempt works on a copy. A child process runs `proper users delete` and kills itself before its
n-th call of a function, n drawn evenly from all calls of an undisturbed deletion. Another child then runs `proper users
check`, as any next command would, and, if the deletion had not begun, deletes again. The search for the user and for
the prints that were made before the kill says what is left.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from proper.adapters.store import AdapterStore
from proper.cli.app import main
from proper.interactions.fingerprints import Fingerprints
from proper.interactions.log import InteractionLog
from proper.interactions.verification import fingerprint, verify

USER = "anna-17"


def in_child(work: Callable[[], int]) -> int:
    """Run `work` in a forked process; return its exit code, negative for a signal."""
    child = os.fork()
    if not child:
        try:
            os.dup2(2, 1)
            os._exit(work())
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def delete(run: Path, kill_at: int, counted: Path) -> int:
    """Delete the user; kill this process before call number `kill_at`, or write the number of calls if it is -1."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        if event in ("call", "c_call"):
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    try:
        code = main(["users", "delete", str(run), "--user", USER])
    finally:
        sys.setprofile(None)
    counted.write_text(str(calls))
    return code


def finish(run: Path) -> int:
    """Run the next command; delete again if the deletion had not begun."""
    code = main(["users", "check", str(run)])
    with closing(AdapterStore(run / "users")) as store:
        known = store.head(USER) is not None
    return main(["users", "delete", str(run), "--user", USER]) if known and not code else code


def state(run: Path, prints: Fingerprints) -> dict[str, Any]:
    """Return whether a deletion is recorded, and how many findings there are of the user."""
    with closing(InteractionLog(run / "users")) as log:
        pending = bool(log.deletions.pending())
    found = verify(run, [(USER, prints)]).certificate["users"][0]["found"]
    return {"pending": pending, "found": found}


def attempt(source: Path, place: Path, kill_at: int, prints: Fingerprints) -> dict[str, Any]:
    run = shutil.copytree(source, place / "run")
    killed = in_child(lambda: delete(run, kill_at, place / "calls"))
    before = state(run, prints)
    finished = in_child(lambda: finish(run))
    after = state(run, prints)
    told = {"at": kill_at, "exit": killed, "begun": before["pending"], "left": len(before["found"])}
    return {**told, "finished": finished, "found": after["found"], "pending": after["pending"]}


def run_all(source: Path, kills: int, seed: int) -> None:
    with closing(AdapterStore(source / "users")) as store, closing(InteractionLog(source / "users")) as log:
        prints = fingerprint(store, log, USER, bytes(range(32)))
    place = source.with_name("attempts")
    place.mkdir()
    print(json.dumps(attempt(source, place, -1, prints)), flush=True)
    calls, draw = int((place / "calls").read_text()), random.Random(seed)
    done = 0
    while done < kills:
        shutil.rmtree(place / "run")
        told = attempt(source, place, draw.randint(1, calls), prints)
        # The number of calls varies a little: one of the last may not be reached, and is drawn again.
        if told["exit"] or told["at"] < 0.9 * calls:
            done += 1
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    run_all(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
