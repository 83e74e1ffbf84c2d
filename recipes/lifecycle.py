"""Rows of new users for recipes/lifecycle.sh, and what they say: simulated users of the demo who arrive later.

    python recipes/lifecycle.py rows DIR COUNT    write the interactions of new users: arrive/ID.jsonl, later/ID.jsonl
    python recipes/lifecycle.py live RUN DIR      enrol all of arrive/, generate for each, log later/ as feedback

A quarter of the users each stay as they are, change abruptly, change slowly, and change and go back; `later/` has the
interactions after the change (`proper.data.demo.changes`).
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path

import proper
from proper.data.demo.banks import load_bank
from proper.data.demo.changes import later_items
from proper.data.demo.users import DemoSettings

RUN_PEOPLE = 24
"""Users of the demo run; the new ones come after them in the same simulated world."""
ARRIVE, LATER = 8, 8
"""Interactions of a user at enrolment, and after the change."""


def write_rows(folder: Path, count: int) -> None:
    """Write the interactions of `count` new users."""
    prompt = load_bank("classification").prompt
    rows: dict[tuple[str, str], list[str]] = {}
    kinds: dict[str, str] = {}
    for item in later_items(DemoSettings(users=RUN_PEOPLE + count), 2, max(ARRIVE, LATER)):
        number = int(item.user.removeprefix("u"))
        if number > RUN_PEOPLE:
            user, part = f"new{number - RUN_PEOPLE:02d}", ("arrive", "later")[item.period]
            kinds[user] = item.change
            row = {"prompt": prompt.replace("{input}", item.text), "target": item.answer}
            rows.setdefault((part, user), []).append(json.dumps(row, ensure_ascii=False))
    for (part, user), lines in rows.items():
        path = folder / part / f"{user}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines[: ARRIVE if part == "arrive" else LATER]) + "\n", encoding="utf-8")
    print(f"{len(kinds)} new users: {dict(sorted(Counter(kinds.values()).items()))}")


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the interactions of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def live(run: Path, folder: Path) -> None:
    """Enrol the users, generate an answer for each, and log their feedback."""
    model, started = proper.load(run), time.perf_counter()
    tiers: Counter[str] = Counter()
    for path in sorted((folder / "arrive").glob("*.jsonl")):
        head = model.users.enrol(path.stem, read_rows(path))
        tiers["none" if head is None else str(head.tier)] += 1
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


if __name__ == "__main__":
    task, *arguments = sys.argv[1:]
    if task == "rows":
        write_rows(Path(arguments[0]), int(arguments[1]))
    else:
        live(Path(arguments[0]), Path(arguments[1]))
