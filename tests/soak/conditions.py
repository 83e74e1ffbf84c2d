"""Conditions at the end: no lost data, no answer of another user, no held resources, each fault at least once.

Every function returns the failures, one line each.
"""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from client_faults import still_open
from ledger import Answer, Ledger
from server import Server
from soak_users import PROMPT, Archive, Asked, offline, says

from proper.adapters.store import AdapterStore
from proper.interactions.log import InteractionLog

REST_SECONDS = 600.0
"""Within which a fit ends while users wait for one."""
SETTLE_SECONDS = 60.0
"""Within which deletions are over that were acknowledged before they were."""
IDLE_SECONDS = 30.0
"""Within which the server closes connections that never finish a request."""
LATE = ("500 store", "503 store", "503 busy", "503 keys", "429 rate_limited")
"""Replies to a write that the store could not take just then; the clients send it again."""
FAULTS = (
    *("worker killed", "server back", "disk has room", "adapter damaged"),
    *("import tried", "slot spoiled", "deleted by the command line"),
    *("lock held: interactions.sqlite", "lock held: users.sqlite"),
    *("flood", "idle connections", "second server"),
)


def at_rest(server: Server) -> list[str]:
    """Wait until whoever came has been fitted; then nothing may run, wait or hold a slot."""
    done, since = -1.0, time.monotonic()
    while True:
        figures = server.figures()
        if not figures["proper_fits_queued"] + figures["proper_fits_running"]:
            break
        # Progress counts, not the whole time: on a busy machine many fits take long, which is no fault.
        if figures["proper_fits_done_total"] != done:
            done, since = figures["proper_fits_done_total"], time.monotonic()
        elif time.monotonic() - since > REST_SECONDS:
            return [f"users still wait for their fits: {figures}"]
        time.sleep(0.2)
    idle = ("batch_rows", "queue_requests", "slots_pinned", "slots_loading")
    return [f"proper_{name} is {figures[f'proper_{name}']:g} at rest" for name in idle if figures[f"proper_{name}"]]


def nothing_lost(folder: Path, ledger: Ledger) -> list[str]:
    """Every acknowledged interaction is in the log, once, as it was sent; nothing else is; the deleted are gone."""
    wrong: list[str] = []
    with closing(InteractionLog(folder / "users")) as log, closing(AdapterStore(folder / "users")) as store:
        for user in sorted({user for user, _ in ledger.sent}):
            logged = Counter((one.id, one.prompt, one.target) for one in log.interactions("", user))
            logged = +Counter({key: count for key, count in logged.items() if not key[0].startswith("first-")})
            sent = {(id_, PROMPT, text) for (who, id_), text in ledger.sent.items() if who == user}
            promised = {(id_, PROMPT, ledger.sent[who, id_]) for who, id_ in ledger.acknowledged if who == user}
            if user in ledger.deleted:
                if logged or store.head(user) is not None or log.knows("", user):
                    wrong.append(f"{user!r} was deleted and is there")
                continue
            wrong += _unconsidered(store, log, user)
            wrong += [f"{user!r} lost {one[0]}" for one in sorted(promised - {*logged})]
            wrong += [f"{user!r} has {one[0]}, which nobody sent" for one in sorted({*logged} - sent)]
            wrong += [f"{user!r} has {one[0]} {count} times" for one, count in logged.items() if count > 1]
    return wrong


def _unconsidered(store: AdapterStore, log: InteractionLog, user: str) -> list[str]:
    """Every interaction in the log was there when the last fit began, whether that became a version or not."""
    fit, held = log.queue.fit("", user), store.versions(user)
    if fit.state in ("queued", "fitting"):
        return [f"{user!r} still waits for a fit at rest"]
    if fit.state != "done" or not held or held[0].version != fit.version:  # rolled back or imported since
        return []
    # An update leaves a row of its own, a first fit only its version.
    attempts = [each.metrics["logged"] for each in log.updates.of("", user)]
    considered, count = max([held[0].metadata["history"].get("logged", 0), *attempts]), log.count("", user)
    return [] if considered == count else [f"{user!r} has {count} interactions, and fits considered {considered}"]


def only_own_answers(run: Path, folder: Path, archive: Archive, ledger: Ledger, words: Mapping[str, str]) -> list[str]:
    """Every answer is what `generate` gives the same user at that version, and holds no other user's word."""
    wrong = []
    known: list[Answer] = []
    for one in ledger.answers:
        if one.version is None or (str(one.user), one.version) in archive.records:
            known.append(one)
        else:
            wrong.append(f"a version that never was: {one}")
    expected = offline(run, folder, archive.records, {_asked(one) for one in known})
    for one in known:
        text = expected[_asked(one)]
        if one.text != text if one.whole else not text.startswith(one.text):
            wrong.append(f"not what generate answers ({text!r}): {one}")
        wrong += _by_word(one, words, ledger)
        if one.fallback is not None and not _damaged(one, ledger):
            wrong.append(f"fell back without damage: {one}")
    return wrong


def _by_word(one: Answer, words: Mapping[str, str], ledger: Ledger) -> list[str]:
    own = words.get(str(one.user))
    if own is not None and one.tier == "users":
        return [] if says(one.text, own) or (not one.whole and not one.text) else [f"not the code word {own!r}: {one}"]
    if own is not None and (one.tier, one.fallback) != ("groups", "damaged adapter"):
        return [f"neither the user's own adapter nor a fallback that is said: {one}"]
    theirs = ledger.guests.get(str(one.user))
    others = {*words.values(), *ledger.guests.values()} - {theirs}
    return [f"another user's code word: {one}" for word in one.text.split() if word in others][:1]


def _damaged(one: Answer, ledger: Ledger) -> bool:
    return any(
        damage.user == one.user
        and damage.since <= one.ended
        and (damage.until is None or one.asked <= damage.until + 0.5)
        for damage in ledger.damages
    )


def _asked(one: Answer) -> Asked:
    return (
        (one.user, one.version, one.tier, one.length) if one.version is not None else (None, None, "none", one.length)
    )


def refused_rightly(ledger: Ledger) -> list[str]:
    """Replies that faults explain: none at all, a server that stops, a log that cannot be written."""
    fair = ("200", "202", "left", "cut off", "Error", "409 user_exists", "404 user_not_found", "409 no_version")
    writes = ("teach", "teach again", "enrol", "delete", "rollback", "read", "versions", "deletion")
    wrong = []
    for what, count in sorted(ledger.replies.items()):
        name, _, said = what.partition(": ")
        if name.startswith("flood") and said.split()[0] in ("400", "413", "429", "503"):
            continue
        if said.endswith(fair) or (name in writes and said in LATE) or "stopping" in said:
            continue
        wrong.append(f"{count} times {what}")
    return wrong


def idle_closed(idle: Sequence[socket.socket]) -> list[str]:
    """The server has closed all connections that never finished a request, and goes on answering; closes them here."""
    deadline = time.monotonic() + IDLE_SECONDS
    while (count := still_open(idle)) and time.monotonic() < deadline:
        time.sleep(0.5)
    for one in idle:
        one.close()
    return [f"{count} connections that never finished a request are still open"] if count else []


def settled(folder: Path, ledger: Ledger) -> list[str]:
    """While the server runs, deletions that were promised come to their end."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (left := _traces(folder, ledger)) and time.monotonic() < deadline:
        time.sleep(2)
    return [f"after {SETTLE_SECONDS:g} s beside the running server: {line}" for line in left]


def nothing_left(folder: Path, ledger: Ledger, hidden_before: set[Path]) -> list[str]:
    """No byte and no file name of the run has a deleted user's marker; no temporary file is there."""
    new = sorted(hidden(folder) - hidden_before)
    return [f"left behind: {line}" for line in [*_traces(folder, ledger), *map(str, new)]]


def hidden(folder: Path) -> set[Path]:
    """Return all files and folders whose name begins with a dot: what atomic writes are made of."""
    return {path for path in folder.rglob(".*")}


def _traces(folder: Path, ledger: Ledger) -> list[str]:
    # A process of its own reads: closing a database's file here would give up the locks that SQLite holds on it.
    markers = [user.rpartition("-")[2] for user in ledger.deleted if "-" in user]
    if not markers:
        return []
    names = [str(path) for path in folder.rglob("*") if any(marker in path.name for marker in markers)]
    patterns = "\n".join(markers)
    command = ["grep", "--recursive", "--text", "--only-matching", "--fixed-strings", "--file=-", str(folder)]
    found = subprocess.run(command, input=patterns, capture_output=True, text=True, errors="replace")
    if found.returncode == 2 and "No such file" not in found.stderr:
        return [f"grep cannot read the run: {found.stderr}"]
    owner = {user.rpartition("-")[2]: user for user in ledger.deleted}
    hits = sorted({tuple(line.rsplit(":", 1)) for line in found.stdout.splitlines()})
    return [*names, *(f"{owner.get(marker, marker)!r} in {path}" for path, marker in hits)]


def enough_done(ledger: Ledger, archive: Archive, words: Mapping[str, str]) -> list[str]:
    """A soak in which something never happened shows nothing about it."""
    answers, done = ledger.answers, [what for _, what in ledger.done]
    happened = {
        "an answer of every user": all(
            any(one.user == user and one.tier == "users" for one in answers) for user in words
        ),
        "an answer to nobody": any(one.tier == "none" for one in answers),
        "a fallback": any(one.fallback is not None for one in answers),
        "an answer by a newer version": any(one.user in words and (one.version or 0) > 1 for one in answers),
        "a guest": bool(ledger.guests),
        "a client that left": bool(ledger.replies["stream: left"]),
        "an answer that was cut off": any("Error" in what for what in ledger.replies),
        "an interaction": any(user in words for user, _ in ledger.acknowledged),
        "a write on a full disk": any("500 store" in what or "503 store" in what for what in ledger.replies),
        "a big prompt that was refused": any(what.startswith("flood of big prompts: 4") for what in ledger.replies),
        **{
            fault: any(what == fault or what.startswith(f"{fault}:") or what.startswith(f"{fault},") for what in done)
            for fault in FAULTS
        },
    }
    return [f"in all the time there was not {what}" for what, there in happened.items() if not there]


def bounded(samples: Sequence[tuple[float, int, int]]) -> list[str]:
    """The memory of one server does not grow without end; lives shorter than a minute tell nothing.

    Args:
        samples: seconds, process id and bytes.
    """
    wrong = []
    for pid in dict.fromkeys(pid for _, pid, _ in samples):
        life = [(at, size) for at, which, size in samples if which == pid and size]
        if not life or life[-1][0] - life[0][0] < 60:
            continue
        middle = (life[0][0] + life[-1][0]) / 2
        first = max(size for at, size in life if life[0][0] + 15 < at <= middle)
        last = max(size for at, size in life if at > middle)
        if last > 1.15 * first + (128 << 20):
            wrong.append(f"process {pid} grew from {first >> 20} to {last >> 20} MiB")
    return wrong


def grouped(wrong: Sequence[str]) -> list[str]:
    """Return the lines with those that differ in numbers and markers only as one, so that every kind is seen."""
    kinds: dict[str, list[str]] = {}
    for line in wrong:
        kinds.setdefault(re.sub(r"[0-9a-f]{16}|[0-9]+", "#", line)[:100], []).append(line)
    return [first if not more else f"{first} (and {len(more)} more like it)" for first, *more in kinds.values()]
