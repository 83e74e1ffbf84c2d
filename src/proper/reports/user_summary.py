"""Summary of one user: versions and the reason of each, source data, gates, gains; as JSON values.

Files are read, no model is loaded. A value that the run's files do not have is None. `user_words` prints the summary
as text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from proper.adapters.records import MADE
from proper.adapters.store import AdapterStore, Version
from proper.config import load_run_config
from proper.interactions.log import InteractionLog
from proper.interactions.user_rows import logged_rows, run_rows
from proper.reports.reading import count, mapping, number, objects, read_object
from proper.reports.user_data import stage_losses
from proper.run_folder import RunFolder, Tier

PART_NAMES = ("history", "query", "unused")
RESTORED = ("rollback", "repair")


def user_summary(
    folder: Path, store: AdapterStore, log: InteractionLog | None, user: str, *, texts: bool = False
) -> dict[str, Any]:
    """Return the summary of a user of the default tenant of the run `folder`.

    Keys: `user`, `tier`, `version`, `bytes`; `interactions` (numbers); `gates`; `gain`; `fit`; and `versions`, newest
    first, each as in the store with `made` (how, why, with which losses) and `from` (the ids of its items). With
    `texts`, `texts` lists all interactions with their texts.

    Args:
        folder: the run folder.
        store: its adapter store.
        log: its interaction log; None if there is none.
        user: a user; without a stored version `tier` is "none".
        texts: whether to include texts.

    Raises:
        RunFolderError: a file is not readable.
    """
    home = RunFolder(folder).home.path
    run = list(run_rows(home, user))
    logged = [] if log is None else list(logged_rows(log, store.tenant, user))
    limit = load_run_config(RunFolder(folder).config).users.max_items
    versions = store.versions(user)
    described = []
    for each in versions:
        described.append({**each.as_json(), "made": made_by(each), "from": source_items(each, run, logged, limit)})
    parts = [str(row["part"]) for row in run]
    fit = None if log is None else log.queue.fit(store.tenant, user)
    return {
        "user": user,
        "tier": str(versions[0].tier if versions else Tier.NONE),
        "version": versions[0].version if versions else None,
        "bytes": versions[0].bytes if versions else 0,
        "interactions": {**{name: parts.count(name) for name in PART_NAMES}, "logged": len(logged)},
        "gates": _gates(folder, user),
        "gain": {"held_out": _held_out(versions), "queries": _queries(folder, user)},
        "fit": None if fit is None or fit.state == "idle" else {"state": fit.state, "message": fit.message},
        "versions": described,
        **({"texts": [*run, *logged]} if texts else {}),
    }


def made_by(version: Version) -> dict[str, Any]:
    """Return how a version was made: `by`, `why`, `promoted`, `losses`; further keys for a rollback or an import.

    `by` is "stage 2", "stage 3", "enrolment", "update", "import", "rollback" or "repair". `promoted` says whether the
    user got an adapter; None where that was not decided. `losses` are nats per token on held-out items of the history:
    `group` and `user`, and the number of items `held_out`.
    """
    metadata, entry = version.metadata, mapping(version.metadata.get(MADE))
    by, promoted = str(entry.get("by") or _trained_by(version)), metadata.get("up")
    reason = metadata.get("reason")
    if by == "rollback":
        reason = f"went back to version {entry.get('of')} from version {entry.get('instead_of')}"
    elif by == "repair" and "of" in entry:
        reason = f"'proper users check --repair' went back to version {entry['of']}, since a newer one was damaged"
    elif by == "import":
        named = f" of user {entry['exported_as']!r}" if "exported_as" in entry else ""
        reason = f"taken over from an export{named}"
    elif reason is None:
        reason = _usual_reason(by, version)
    losses = {"group": number(metadata.get("group_loss")), "user": number(metadata.get("user_loss"))}
    measured = {**losses, "held_out": count(metadata.get("held_out"))} if None not in losses.values() else None
    more = {key: value for key, value in entry.items() if key != "by"}
    decided = promoted if isinstance(promoted, bool) else None
    return {"by": by, "why": str(reason), "promoted": decided, "losses": measured, **more}


def _trained_by(version: Version) -> str:
    if "history" in version.metadata:
        return "enrolment" if version.parent is None else "update"
    if version.tier == Tier.USERS or {"up", "reason", "items"} & set(version.metadata):
        return "stage 3"
    return "stage 2"


def _usual_reason(by: str, version: Version) -> str:
    if by == "stage 2":
        return "learnt the user's embedding together with the groups"
    if version.tier == Tier.USERS:
        return "fitted an adapter to all items (users.tiers.select is off)"
    return "fitted the user's embedding only"


def source_items(
    version: Version, run: Iterable[Mapping[str, Any]], logged: Iterable[Mapping[str, Any]], limit: int | None
) -> dict[str, list[Any]] | None:
    """Return the ids of the items a version was made from: `rows` of the run's data, `items`, and `logged` ids.

    They follow from the numbers in the version's metadata: the log only grows, so a fit of n logged interactions was
    one of the first n, and of more than `limit` items a fit takes the newest. With `groups.max_tokens`, stage 2 takes a
    sample of the rows that are listed for it. None for a version from elsewhere.
    """
    history = mapping(version.metadata.get("history"))
    origin = mapping(version.metadata.get(MADE))
    if "import" in (origin.get("by"), mapping(origin.get("before")).get("by")):
        return None
    found = [(_time(row["timestamp"], None), row) for row in run if row["part"] == "history"]
    since = count(history.get("since")) or 0
    if history.get("run", 0) is None or since:
        found = []  # that fit had no data of the run, or only what came after the user's habits had changed
    taken = list(logged)[max(0, since - 1) : count(history.get("logged")) or 0]
    found += [(_time(row["timestamp"], row["received"]), row) for row in taken]
    ordered = [row for _, row in sorted(found, key=lambda pair: pair[0])]
    if _trained_by(version) != "stage 2":
        ordered = ordered[-(limit or len(ordered)) :] if ordered else []
    ours = [row for row in ordered if row["source"] == "run"]
    items = [row["item"] for row in ours if row["item"] is not None]
    return {
        "rows": [row["row"] for row in ours],
        "items": items,
        "logged": [row["id"] for row in ordered if row["source"] == "log"],
    }


def _time(own: Any, received: float | None) -> float:
    """Return the time by which a fit orders an item; see `enrolment.history`."""
    return own if own is not None else -math.inf if received is None else received


def _gates(folder: Path, user: str) -> dict[str, Any] | None:
    """Return a target user's mean gates over all tokens of their history, as the evaluation measured them."""
    rows = objects(read_object(RunFolder(folder).routing).get("users"))
    row = next((row for row in rows if row.get("user") == user), None)
    if row is None or not isinstance(row.get("gates"), list):
        return None
    shares = [number(share) or 0.0 for share in row["gates"]]
    return {"shares": shares, "main": row.get("main"), "words": gate_words(shares)}


def gate_words(shares: list[float]) -> str:
    """Return mean gates in words, as in "mostly group 3 (.61), then group 1 (.20)"."""
    order = sorted(range(len(shares)), key=lambda at: (-shares[at], at))
    first, groups = shares[order[0]], [f"group {at} ({decimal(shares[at], 2)})" for at in order[:2]]
    if len(shares) == 1:
        return "group 0, the only one"
    then = f", then {groups[1]}"
    if first >= 0.5:
        return f"mostly {groups[0]}{then}"
    if first >= 1.25 / len(shares):
        return f"more than others {groups[0]}{then}"
    return f"all {len(shares)} groups about equally; most {groups[0]}"


def decimal(value: float, digits: int = 3) -> str:
    """Return a number with a fixed number of decimals and no leading zero: .25, 1.30."""
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 and not text.lstrip("-").startswith("1") else text


def _held_out(versions: list[Version]) -> dict[str, Any] | None:
    """Return the losses that decided on the current version, if they were measured."""
    losses = made_by(versions[0])["losses"] if versions else None
    return None if losses is None else {**losses, "gain": losses["group"] - losses["user"]}


def _queries(folder: Path, user: str) -> dict[str, Any] | None:
    """Return the last evaluation's scores on the user's own queries, with groups and with users, means over seeds.

    They may be of an earlier version of the user. `loss` is that of the first seed.
    """
    scores = read_object(RunFolder(folder).user_scores)
    row = next((row for row in objects(scores.get("users")) if row.get("user") == user), None)
    if row is None:
        return None
    task = next(iter(mapping(scores.get("tasks"))), "")  # of several, the rows are the first one's
    values, losses = mapping(row.get("values")), stage_losses(folder, user, task)
    seeds = mapping(read_object(RunFolder(folder).results).get("run")).get("seeds")
    return {
        "metric": scores.get("metric"),
        "higher_is_better": scores.get("higher_is_better") is not False,
        "queries": count(row.get("queries")),
        "seeds": len(seeds) if isinstance(seeds, list) else None,
        "groups": number(values.get("groups")),
        "users": number(values.get("users")),
        "gain": number(row.get("gain_users")),
        "loss": {stage: losses.get(stage) for stage in ("groups", "users")},
    }
