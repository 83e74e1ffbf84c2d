"""Data of one user's report page: scores, routing, adapter store metadata, and all answers.

Only the store's metadata and embeddings are read; no adapter and no model is loaded.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from proper.adapters.manifest import user_of
from proper.adapters.store import AdapterStore, Version
from proper.data.dataset import Dataset
from proper.databases.location import is_made
from proper.errors import InputError, StoreError, did_you_mean
from proper.reports.examples import ReportExample, task_kinds, user_examples
from proper.reports.load import RoutedUser, RunFiles, UserGain
from proper.reports.reading import count, mapping, number, objects, read_lines, read_object
from proper.run_folder import STAGE_METHODS, RunFolder

NEAREST = 8


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Another user of the store; `cosine` is the cosine similarity of the two embeddings."""

    user: str
    cosine: float
    tier: str


@dataclass(frozen=True, slots=True)
class Stored:
    """Store data of a user: all versions (newest first), and the nearest users.

    `typical` is the median cosine to all other users, `means` the mean over target users of every numeric metadata
    field, `problem` the reason why the store could not be read.
    """

    versions: tuple[Version, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    typical: float | None = None
    means: Mapping[str, float] | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class UserReport:
    """One user of a run; values that the run's files lack are None or empty.

    Attributes:
        rows: length of the history that stage 3 chooses from, of all tasks together.
        scores: the user's main metric by method, on the user's own queries.
        losses: the user's mean answer loss on queries by stage, first seed, in nats per token. Of several tasks,
            this and `gain`, `scores` and `queries` are of the first.
        history_loss: answer loss of method `users` on the user's newest history items, and the mean over all users.
        examples: all queries of the user with the answers of each stage, first seed.
    """

    user: str
    history: int | None
    rows: int | None
    queries: int | None
    gain: UserGain | None
    scores: Mapping[str, float]
    losses: Mapping[str, float]
    history_loss: tuple[float, float] | None
    routed: RoutedUser | None
    stored: Stored
    examples: tuple[ReportExample, ...]


def load_user(run: RunFiles, user: str) -> UserReport:
    """Read the data of `user` from a run folder.

    Raises:
        InputError: the run does not have this user; the message names the user and the nearest id.
        RunFolderError: a file is not readable.
        StoreError: the store is damaged. A store that cannot be opened is reported on the page instead.
    """
    gain = next((row for row in run.gains if row.user == user), None)
    stored, interactions = _stored(run, user), _interactions(run.folder, user)
    if gain is None and interactions is None and not stored.versions:
        hint = did_you_mean(user, [row.user for row in run.gains])
        raise InputError(f"--user {user!r}: no such user in {run.folder}; {hint}")
    rows = objects(read_object(RunFolder(run.folder).user_scores).get("users"))
    row = next((row for row in rows if row.get("user") == user), {})
    scores = {name: found for name, value in mapping(row.get("values")).items() if (found := number(value)) is not None}
    return UserReport(
        user=user,
        history=gain.history if gain else interactions,
        rows=gain.history if gain and not run.first_task else interactions,
        queries=gain.queries if gain else None,
        gain=gain,
        scores=scores,
        losses=stage_losses(run.folder, user, run.first_task),
        history_loss=_history_loss(run.folder, user),
        routed=next((row for row in run.routed if row.user == user), None),
        stored=stored,
        examples=tuple(user_examples(run.folder, str(run.part("task").get("kind") or ""), user, task_kinds(run))),
    )


def _interactions(folder: Path, user: str) -> int | None:
    """Return the length of a user's history from the prepared data; None for an unknown user."""
    path = RunFolder(folder).data
    if not path.is_file():
        return None
    dataset = Dataset.open(path)
    try:
        found = dataset.user(user)
        return None if found is None else found.history
    finally:
        dataset.close()


def _stored(run: RunFiles, user: str) -> Stored:
    users = RunFolder(run.folder).users
    if not is_made(users.manifest):
        return Stored(problem="the run has no adapter store; stage 'users' makes it")
    try:
        store = AdapterStore(users.path)
    except StoreError as error:
        return Stored(problem=str(error))
    try:
        versions = tuple(store.versions(user))
        if not versions:
            return Stored(problem="it has no record of this user, who was deleted or was not in stage 2")
        neighbours, typical = _nearest(store, user)
        return Stored(versions, tuple(neighbours), typical, _means(store, {row.user for row in run.gains}))
    finally:
        store.close()


def _nearest(store: AdapterStore, user: str) -> tuple[list[Neighbour], float | None]:
    """Return the users with the nearest embeddings, and the median cosine to all users; embeddings stream."""
    head = store.head(user)
    own = np.zeros(0) if head is None else head.embedding.numpy().astype(np.float64)
    if not own.any():
        return [], None
    cosines: list[float] = []

    def others() -> Iterator[Neighbour]:
        for row in store.manifest.heads(store.tenant):
            other = np.frombuffer(row.embedding, dtype=np.float32).astype(np.float64)
            if user_of(row.user) != user and other.shape == own.shape and other.any():
                cosines.append(float(own @ other / np.sqrt((own @ own) * (other @ other))))
                yield Neighbour(user_of(row.user), cosines[-1], row.tier)

    nearest = heapq.nsmallest(NEAREST, others(), key=lambda found: (-found.cosine, found.user))
    return nearest, median(cosines) if cosines else None


def _means(store: AdapterStore, targets: set[str]) -> dict[str, float]:
    """Return the mean of each numeric metadata field over the target users."""
    found: dict[str, list[float]] = {}
    for user, _, metadata, _ in store.metadata():
        for key, value in metadata.items() if user in targets else ():
            if (finite := number(value)) is not None:
                found.setdefault(key, []).append(finite)
    return {key: fmean(values) for key, values in found.items()}


def stage_losses(folder: Path, user: str, task: str = "") -> dict[str, float]:
    """Return a user's mean answer loss on the queries of a task by stage, first seed, in nats per token."""
    found = {}
    for stage in STAGE_METHODS:
        lines = read_lines(RunFolder(folder).predictions_of(stage))
        rows = (row for row in lines if row.get("user") == user and (row.get("task") or "") == task)
        losses = [number(row.get("loss")) for row in rows]
        known = [loss for loss in losses if loss is not None]
        if known:
            found[stage] = fmean(known)
    return found


def _history_loss(folder: Path, user: str) -> tuple[float, float] | None:
    measured = mapping(mapping(read_object(RunFolder(folder).analysis).get("history_losses")).get("value"))
    own = number(measured.get(user))
    values = [value for each in measured.values() if (value := number(each)) is not None]
    return None if own is None else (own, fmean(values))


def metadata_of(report: UserReport) -> dict[str, Any]:
    """Return the metadata of the current version; empty for a user who is not in the store."""
    return dict(report.stored.versions[0].metadata) if report.stored.versions else {}


def known_items(report: UserReport) -> int | None:
    """Return the history length as scored, else as in the store."""
    return report.history if report.history is not None else count(metadata_of(report).get("items"))
