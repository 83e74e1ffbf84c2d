"""Starting replicas on a cluster with Ray Serve, and the thread that sends requests to them."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from proper.cluster.address import Devices, connected, devices
from proper.cluster.replica import EngineReplica
from proper.cluster.serving import ClusterEngine, ClusterModel
from proper.errors import InputError, ProperError
from proper.inference.requests import EngineLimits

QUIET = {"log_level": "WARNING"}
"""Logging of Ray Serve's processes."""

_RANGE = re.compile(r"([1-9]\d*)(?::([1-9]\d*))?")


@dataclass(frozen=True)
class ReplicaSettings:
    """Number of replicas, and limits of each.

    Attributes:
        least, most: number of replicas; with `most` above `least`, it follows the number of open requests.
        target: mean number of open requests of a replica that the autoscaler aims at, as a multiple of the batch rows.
        full: number of open requests, as a multiple of the batch rows, at which a user's requests go elsewhere.
        grow_seconds: how long there must be too few replicas before one is added.
        shrink_seconds: how long there must be too many replicas before one is drained and removed.
        drain_seconds: how long a replica that is removed may finish its requests.
    """

    least: int
    most: int
    target: float = 1.0
    full: float = 2.0
    grow_seconds: float = 15.0
    shrink_seconds: float = 300.0
    drain_seconds: float = 30.0


def parse_replicas(text: str | None, count: int) -> tuple[int, int]:
    """Return the minimum and maximum number of replicas of a text such as `2` or `2:8`; `count` without a text.

    Raises:
        InputError: `text` is neither.
    """
    if text is None:
        return count, count
    found = _RANGE.fullmatch(text)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise InputError(f"--replicas {text}: write a number of replicas, or MIN:MAX")
    return least, most


class ClusterRunner:
    """A cluster engine and its thread.

    Attributes:
        on_error: never called: Ray Serve replaces replicas that fail.
    """

    def __init__(self, engine: ClusterEngine) -> None:
        self.engine = engine
        self.error: BaseException | None = None
        self.on_error: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=engine.run, name="proper-replicas", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether requests are sent to replicas."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Finish all remaining requests as cancelled, and end the thread."""
        self.engine.close()
        self._thread.join()


class RunReplicas:
    """The replicas of a run on a connected cluster, under one name, which a new run may take over.

    Args:
        name: the name of Ray Serve's application.
        limits: limits of each engine.
        settings: number of replicas, and limits of each.
        room: resources that each of them reserves.
    """

    def __init__(self, name: str, limits: EngineLimits, settings: ReplicaSettings, room: Devices) -> None:
        self.name, self.limits, self.settings, self.room = name, limits, settings, room
        self._deployed = 0

    @contextmanager
    def serving(self, folder: Path) -> Iterator[ClusterRunner]:
        """Start replicas of a run; those of a former run are drained and replaced one after the other.

        Args:
            folder: the run folder, seen by all machines.

        Raises:
            ProperError: the replicas do not start.
        """
        handle = self._deploy(folder)
        loaded = handle.options(method_name="model").remote().result()
        engine = ClusterEngine(handle, ClusterModel(folder, loaded), loaded)
        try:
            yield ClusterRunner(engine)
        finally:
            engine.close_stores()

    def _deploy(self, folder: Path) -> Any:
        """Start or replace the replicas, and return their handle."""
        from ray import serve

        self._deployed += 1
        number = self._deployed  # another one than before, so that Ray Serve replaces the replicas
        bound = self._deployment().bind(str(folder), self.limits, self.room.threads, number)
        try:
            return serve.run(bound, name=self.name, route_prefix=None)
        except RuntimeError as error:
            raise ProperError(f"{folder}: the replicas do not start: {error}") from error

    def _deployment(self) -> Any:
        from ray import serve
        from ray.serve.config import AutoscalingConfig, RequestRouterConfig

        from proper.cluster.user_router import UserRouter

        settings, rows = self.settings, self.limits.rows
        scaling: dict[str, Any] = {"num_replicas": settings.least}
        if settings.most > settings.least:
            scaling = {
                "autoscaling_config": AutoscalingConfig(
                    min_replicas=settings.least,
                    max_replicas=settings.most,
                    target_ongoing_requests=settings.target * rows,
                    upscale_delay_s=settings.grow_seconds,
                    downscale_delay_s=settings.shrink_seconds,
                )
            }
        deployment: Any = serve.deployment(
            ray_actor_options={"num_cpus": self.room.cpus, "num_gpus": self.room.gpus},
            max_ongoing_requests=max(1, round(settings.full * rows)),
            graceful_shutdown_timeout_s=settings.drain_seconds,
            request_router_config=RequestRouterConfig(request_router_class=cast(Any, UserRouter)),
            logging_config=QUIET,
            **scaling,
        )
        return deployment(EngineReplica)


@contextmanager
def replicas_on(
    address: str, name: str, limits: EngineLimits, replicas: str | None, drain_seconds: float
) -> Iterator[RunReplicas]:
    """Connect to a cluster on which replicas run within the block; afterwards they are drained and removed.

    Args:
        address: auto or local:N.
        name: the name of the run among those that the cluster serves.
        limits: limits of each engine.
        replicas: `N` or `MIN:MAX`; one per device if None.
        drain_seconds: how long a replica that is removed may finish its requests.

    Raises:
        InputError: the address is unknown, no cluster answers there, or `replicas` is malformed.
        MissingExtraError: Ray is not installed.
    """
    if address.startswith("ray://"):
        raise InputError(
            f"--cluster {address}: Ray's client does not support streams; run 'proper serve --cluster auto' on a "
            "machine of the cluster"
        )
    parse_replicas(replicas, 1)
    with connected(address):
        from ray import serve

        room = devices(address)
        least, most = parse_replicas(replicas, room.count)
        # It warns of each full or dead replica; the engine says once what was lost.
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        # No HTTP server of Ray Serve's own: the routes, keys and limits are those of `proper serve`.
        serve.start(proxy_location="Disabled", logging_config=QUIET)
        app = f"proper-{name}"
        try:
            yield RunReplicas(app, limits, ReplicaSettings(least, most, drain_seconds=drain_seconds), room)
        finally:
            serve.delete(app)
