"""The Python parts of recipes/lifecycle.sh: simulated users of the demo who arrive after training, and their results.

    python recipes/lifecycle.py rows DIR COUNT    write the interactions of new users: arrive/ID.jsonl, later/ID.jsonl
    python recipes/lifecycle.py live RUN DIR      enrol the users of arrive/, answer a prompt of each, log later/
    python recipes/lifecycle.py drifted DIR       print the users in DIR/drift.jsonl who have drifted; fails if none has
    python recipes/lifecycle.py updated RUN DIR   print the result of each update and its reason; write the users with
                                                  a new version to DIR/promoted.txt; fails if there is none

A quarter of the users each stay as they are, change abruptly, change slowly, and change and go back; `later/` has the
interactions after the change (`proper.data.demo.changes`).
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import proper
from proper.data.demo.banks import load_bank
from proper.data.demo.changes import later_items
from proper.data.demo.users import DemoSettings
from proper.interactions.log import InteractionLog

RUN_USERS = 24
"""Users of the demo run; the new ones come after them in the same simulated world."""
ARRIVE, LATER = 8, 8
"""Interactions of a user at enrolment, and after the change."""


def write_rows(folder: Path, count: int) -> None:
    """Write the interactions of `count` new users."""
    prompt = load_bank("classification").prompt
    rows: dict[tuple[str, str], list[str]] = {}
    kinds: dict[str, str] = {}
    for item in later_items(DemoSettings(users=RUN_USERS + count), 2, max(ARRIVE, LATER)):
        number = int(item.user.removeprefix("u"))
        if number > RUN_USERS:
            user, part = f"new{number - RUN_USERS:02d}", ("arrive", "later")[item.period]
            kinds[user] = item.change
            row = {"prompt": prompt.replace("{input}", item.text), "target": item.answer}
            rows.setdefault((part, user), []).append(json.dumps(row, ensure_ascii=False))
    for (part, user), lines in rows.items():
        path = folder / part / f"{user}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines[: ARRIVE if part == "arrive" else LATER]) + "\n", encoding="utf-8")
    print(f"{len(kinds)} new users: {dict(sorted(Counter(kinds.values()).items()))}")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def live(run: Path, folder: Path) -> None:
    """Enrol the users, generate an answer for each, and log their feedback."""
    model, started = proper.load(run), time.perf_counter()
    arrived = {path.stem: read_rows(path) for path in sorted((folder / "arrive").glob("*.jsonl"))}
    # Together: the steps of their embeddings are taken in common batches.
    model.users.enrol_many({user: model.users.entries(user, rows) for user, rows in arrived.items()})
    heads = [model.users.head(user) for user in arrived]
    tiers = Counter("none" if head is None else str(head.tier) for head in heads)
    seconds = time.perf_counter() - started
    print(f"enrolled {sum(tiers.values())} users in {seconds:.0f} s: {dict(sorted(tiers.items()))}")
    later = {path.stem: read_rows(path) for path in sorted((folder / "later").glob("*.jsonl"))}
    answers = model.generate([rows[0]["prompt"] for rows in later.values()], list(later))
    right = sum(answer.strip() == rows[0]["target"] for answer, rows in zip(answers, later.values(), strict=True))
    print(f"generated {len(answers)} answers; {right} are what the user wants by now")
    for user, rows in later.items():
        model.users.log.append("", user, model.users.entries(user, rows))
    print(f"logged {sum(map(len, later.values()))} interactions as feedback")
    model.close()


def drifted(folder: Path) -> None:
    """Print how many users have drifted, and the most drifted; fail if no user has."""
    rows = [row for row in read_rows(folder / "drift.jsonl") if "user" in row]  # the others are about groups
    found = [row for row in rows if row["drifted"]]
    for row in found[:5]:
        losses = f"loss {row['loss']:.2f}, usually {row['usual']:.2f} nats per token"
        print(f"{row['user']}: {losses}; score {row['score']:.1f}")
    print(f"{len(found)} of {len(rows)} users with new interactions have drifted")
    if not found:
        sys.exit("no user has drifted, though three of four new users change")


def updated(run: Path, folder: Path) -> None:
    """Print the result of every update and its reason; write the users with a new version; fail if there is none."""
    tried = [line.split("\t")[0] for line in (folder / "updated.tsv").read_text(encoding="utf-8").splitlines()]
    with closing(InteractionLog(run / "users")) as log:
        latest = {user: log.updates.of("", user)[0] for user in tried}
    promoted = [user for user, attempt in latest.items() if attempt.version is not None]
    for user, attempt in latest.items():
        print(f"{user}: {'' if attempt.version is None else f'version {attempt.version}: '}{attempt.reason}")
    print(f"{len(tried)} updates tried: {len(promoted)} promoted, {len(tried) - len(promoted)} not promoted")
    if not promoted:
        sys.exit("no update was promoted, though the users have changed")
    (folder / "promoted.txt").write_text("\n".join(promoted) + "\n", encoding="utf-8")


TASKS: dict[str, Callable[..., None]] = {"rows": write_rows, "live": live, "drifted": drifted, "updated": updated}

if __name__ == "__main__":
    task, *arguments = sys.argv[1:]
    TASKS[task](*(int(each) if each.isdecimal() else Path(each) for each in arguments))
