"""Processes that work on one users folder and are killed at random points; prints what they said as JSON.

    python stressed_users.py USERS SECONDS PROCESSES SEED

Each process appends, puts, reads and deletes, and opens and closes the databases. A new one takes the place of a killed
one; all are forked before they open anything. What a process said is done: `kept USER ID`, `gone USER`. It says
`begins USER` before a deletion.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from contextlib import ExitStack, closing
from pathlib import Path
from random import Random

import torch

from proper.adapters.store import AdapterStore, UserRecord
from proper.interactions.deletion import finish_deletions, remove
from proper.interactions.log import InteractionLog, LogEntry


def work(users: Path, name: str, draw: Random, said: int) -> None:
    """Work until this process is killed; users are named NAME-NUMBER."""
    number, present = 0, list[str]()

    def say(line: str) -> None:
        os.write(said, f"{line}\n".encode())

    while True:
        with ExitStack() as stack:
            store = stack.enter_context(closing(AdapterStore(users)))
            log = stack.enter_context(closing(InteractionLog(users)))
            for _ in range(draw.randrange(1, 20)):
                kind = draw.random()
                if kind < 0.15 or not present:
                    number += 1
                    user = f"{name}-{number}"
                    log.append("", user, [LogEntry(f"of {user} ", "first", id="0")], new=True)
                    present.append(user)
                    say(f"kept {user} 0")
                elif kind < 0.6:
                    user, key = draw.choice(present), str(draw.getrandbits(40))
                    log.append("", user, [LogEntry(f"of {user} " * draw.choice([1, 40, 900]), "x", id=key)])
                    say(f"kept {user} {key}")
                elif kind < 0.75:
                    user = draw.choice(present)
                    store.put([UserRecord(user, "groups", torch.ones(draw.randrange(1, 300)))])
                elif kind < 0.9:
                    list(store.users())
                    log.count("", draw.choice(present))
                elif kind < 0.95:
                    user = present.pop(draw.randrange(len(present)))
                    say(f"begins {user}")
                    if not remove(store, log, user, 1.0).waits:
                        say(f"gone {user}")
                else:
                    finish_deletions(users)


def main(users: Path, seconds: float, processes: int, seed: int) -> None:
    draw, started, running, until = Random(seed), 0, list[int](), time.monotonic() + seconds
    said = os.open(users.parent / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while time.monotonic() < until:
        while len(running) < processes:
            started += 1
            child = os.fork()
            if not child:
                try:
                    work(users, f"p{started}", Random(f"{seed} {started}"), said)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(1)
            running.append(child)
        time.sleep(draw.uniform(0.05, 0.8))
        kill(running.pop(draw.randrange(processes)))
    for child in running:
        kill(child)
    lines = [line.split(" ") for line in (users.parent / "said").read_text().splitlines()]
    told = {what: [rest for first, *rest in lines if first == what] for what in ("kept", "begins", "gone")}
    print(json.dumps({"processes": started, **told}))


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended == -signal.SIGKILL, f"it ended by itself with {ended}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
