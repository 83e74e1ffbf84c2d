"""Stage 3a on a cluster: one actor per device fits pieces of the users; the driver collects the adapters.

    driver   cuts the users of a phase into pieces, hands a piece to whichever actor is free, and puts the records of a
             finished piece into the run's store
    actor    fits the users of a piece with `fit_adapters` into a store in the piece's own folder, with its checkpoint

A user's adapter does not depend on the other users of a batch, so neither does it on pieces, actors or their number.
A piece's folder outlives its actor and the driver: the next actor with the piece continues from its checkpoint, and a
finished piece is only collected. Actors that die are replaced, and nodes that join get actors, while there are pieces.
"""

from __future__ import annotations

import shutil
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from proper.adapters.store import AdapterStore, UserRecord
from proper.cluster.address import Devices, devices
from proper.cluster.shared_stages import last_line
from proper.errors import ProperError
from proper.files import make_folder, write_json
from proper.json_records import read_record
from proper.models.checkpoints import load_bases
from proper.run_folder import RunFolder, Tier
from proper.training.user_stage import AdapterPhase, Metadata, UserStage, fit_marker, is_stored, warn

PIECE = 256
"""Most users in a piece."""

PIECES_PER_DEVICE = 4
"""Pieces for each device where there are few users, so that no device waits long for the last one."""

DEATHS = 3
"""Number of actors that may die with the same piece, or while they start, before the run ends with an error."""


@dataclass(frozen=True)
class UserPiece:
    """Some users of one phase of stage 3a, whom one actor fits.

    Attributes:
        folder: the piece's own folder, seen by all machines.
        embeddings: e_u of `users` (U, D).
        trial, part: as in `HistoryJobs`.
        scale: factor on the finished adapters.
    """

    phase: str
    folder: Path
    users: tuple[str, ...]
    embeddings: Float[Tensor, "U D"]
    trial: bool
    part: int
    scale: float

    @property
    def store(self) -> Path:
        """Folder of the store with the piece's records."""
        return self.folder / "store"

    @property
    def is_done(self) -> bool:
        """Whether all its users are fitted."""
        return fit_marker(self.folder, self.phase).exists()


@dataclass(frozen=True)
class ClusterFitting:
    """The `FitAdapters` of a connected cluster.

    Attributes:
        address: the cluster's address.
        home: the run folder with config and data.
        folder: the seed's folder.
        seed: the seed.
    """

    address: str
    home: Path
    folder: Path
    seed: int

    def __call__(self, stage: UserStage, phase: AdapterPhase) -> None:
        """Fit the adapters of a phase on the cluster; the finished ones are written to its store."""
        pieces = cut(stage, phase, devices(self.address).count)
        ready = [piece for piece in pieces if piece.is_done]
        waiting = deque(piece for piece in pieces if not piece.is_done)
        with stage.bar(f"users: {phase.name}", len(phase.jobs)) as advance:
            for piece in ready:
                collect(piece, phase)
                advance(len(piece.users))
            for piece, lines in self._fitted(waiting):
                for line in lines:
                    stage.log(line)
                collect(piece, phase)
                advance(len(piece.users))
        for piece in pieces:
            shutil.rmtree(piece.folder, ignore_errors=True)

    def _fitted(self, waiting: deque[UserPiece]) -> Iterator[tuple[UserPiece, list[dict[str, Any]]]]:
        """Yield every piece when it is fitted, with the log lines of its training."""
        import ray

        idle: dict[Any, Any] = {}
        running: dict[Any, tuple[Any, UserPiece]] = {}
        deaths: Counter[Path | None] = Counter()
        while waiting or running:
            for actor in self._missing(len(idle) + len(running), len(waiting)):
                idle[actor.ready.remote()] = actor
            done, _ = ray.wait([*idle, *running], timeout=5.0)
            for call in done:
                try:
                    lines = ray.get(call)
                except ray.exceptions.RayActorError as error:
                    # Without a piece, the worker died while it opened the run.
                    lost = None if idle.pop(call, None) is not None else running.pop(call)[1]
                    where = None if lost is None else lost.folder
                    deaths[where] += 1
                    if deaths[where] == DEATHS:
                        doing = "opened the run" if lost is None else f"fitted {len(lost.users)} users"
                        raise ProperError(f"{DEATHS} workers died while they {doing}: {last_line(error)}") from error
                    if lost is not None:
                        waiting.appendleft(lost)
                    continue
                except ray.exceptions.RayTaskError as error:
                    raise ProperError(f"a worker failed: {last_line(error)}") from error
                actor = idle.pop(call, None)
                if actor is None:
                    actor, piece = running.pop(call)
                    yield piece, lines
                if waiting:
                    piece = waiting.popleft()
                    running[actor.fit.remote(piece)] = (actor, piece)

    def _missing(self, actors: int, waiting: int) -> Iterator[Any]:
        """Start the actors that the cluster has room and work for."""
        import ray

        now = devices(self.address)
        for _ in range(min(now.count - actors, waiting)):
            options = {"num_cpus": now.cpus, "num_gpus": now.gpus, "max_restarts": 0}
            made = ray.remote(UserWorker).options(**options)
            yield made.remote(str(self.home), str(self.folder), self.seed, now)


class UserWorker:
    """Actor with the trained groups of a seed, which fits users."""

    def __init__(self, home: str, folder: str, seed: int, room: Devices) -> None:
        import torch

        from proper.cluster.opening import open_runner

        torch.set_num_threads(room.threads)
        self._opened = open_runner(Path(home), Path(folder), seed, logging=False)
        self.runner, self.room = self._opened.__enter__(), room
        self.model = self.runner.trained_groups()
        self.model.add_lora_router(self.runner.config.users)
        load_bases(self.model, RunFolder(Path(folder)).users.bases)

    def ready(self) -> None:
        """Return when the model is loaded."""

    def fit(self, piece: UserPiece) -> list[dict[str, Any]]:
        """Fit the users of a piece into its store, and return the log lines of the training."""
        from proper.console import no_bar
        from proper.training.starts import load_start
        from proper.training.user_stage import fit_adapters

        lines: list[dict[str, Any]] = []
        store = AdapterStore(piece.store)
        try:
            stage = UserStage(
                model=self.model,
                config=self._config(),
                dataset=self.runner.dataset,
                encoder=self.runner.personal,
                users=piece.users,
                embeddings=piece.embeddings,
                store=store,
                folder=piece.folder,
                seed=self.runner.seed,
                checkpoint_seconds=self.runner.config.compute.checkpoint_seconds,
                log=lines.append,
                starts=load_start(self.runner.config.users, RunFolder(self.runner.folder).users.start),
                bar=no_bar,
            )
            jobs = stage.jobs(range(len(piece.users)), piece.trial, piece.part)
            cache = self.runner.config.compute.cache_mb // self.room.per_node
            with self.model.caching(piece.folder, cache):
                fit_adapters(stage, AdapterPhase(piece.phase, jobs, store, scale=piece.scale))
        finally:
            store.close()
        return lines

    def _config(self) -> Any:
        """Return the settings of stage 3, with slots for this actor's share of the machine's memory."""
        from proper.models.memory import device_memory
        from proper.training.memory import auto_slots, footprint

        config = self.runner.config.users
        if config.slots != "auto":
            return config
        device = self.model.device
        parts = footprint(self.model, config, self.runner.encoder.max_length)
        shared = self.room.per_node if device.type == "cpu" else 1
        return config.model_copy(update={"slots": auto_slots(parts, device_memory(device) // shared, device.type)})


def cut(stage: UserStage, phase: AdapterPhase, count: int) -> list[UserPiece]:
    """Cut the users of a phase into pieces, the same ones after a restart on another number of devices."""
    jobs, folder = phase.jobs, stage.folder / f"{phase.name}-pieces"
    path = folder / "size.json"
    if not path.exists():
        make_folder(folder)
        write_json(path, {"size": max(1, min(PIECE, -(-len(jobs) // (PIECES_PER_DEVICE * count))))})
    size = int(read_record(path, size=int)["size"])
    pieces = []
    for at in range(0, len(jobs), size):
        here = slice(at, at + size)
        part = (tuple(jobs.users[here]), jobs.embeddings[here].clone(), jobs.trial, jobs.part, phase.scale)
        pieces.append(UserPiece(phase.name, folder / str(at), *part))
    for piece in pieces:
        make_folder(piece.folder)
    return pieces


def collect(piece: UserPiece, phase: AdapterPhase) -> None:
    """Put the records of a fitted piece into the phase's store, with the users' metadata, unless they are there."""
    made, store = AdapterStore(piece.store), phase.store
    try:
        store.put(record for record in _records(made, piece.users, phase.metadata) if not is_stored(store, record))
    finally:
        made.close()


def _records(made: AdapterStore, users: Sequence[str], metadata: Metadata) -> Iterator[UserRecord]:
    for user in users:
        record = made.get(user, coded=True)
        if record is None:
            continue
        if record.tier == Tier.GROUPS:
            warn(user, str(record.metadata.get("reason")))
        yield replace(record, metadata={**metadata(user), **record.metadata})
