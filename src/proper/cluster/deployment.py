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

from proper.cluster.address import connected, devices
from proper.cluster.replica import EngineReplica
from proper.cluster.serving import ClusterEngine, ClusterModel
from proper.errors import InputError, ProperError
from proper.inference.requests import EngineLimits

_RANGE = re.compile(r"([1-9]\d*)(?::([1-9]\d*))?")


@dataclass(frozen=True)
class ReplicaSettings:
    """How many replicas there are, and what each may have to do.

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
    """Return the least and the most replicas that `2` or `2:8` stand for; `count` of them without a text.

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


@contextmanager
def on_replicas(
    address: str, folder: Path, limits: EngineLimits, replicas: str | None, drain_seconds: float
) -> Iterator[ClusterRunner]:
    """Connect to a cluster and start replicas of a run within the block; afterwards they are drained and removed.

    Args:
        address: auto or local:N.
        folder: the run folder, seen by all machines.
        limits: limits of each engine.
        replicas: `N` or `MIN:MAX`; one per device if None.
        drain_seconds: how long a replica that is removed may finish its requests.

    Raises:
        InputError: the address is unknown, no cluster answers there, or `replicas` is malformed.
        MissingExtraError: Ray is not installed.
        ProperError: the replicas do not start.
    """
    if address.startswith("ray://"):
        raise InputError(
            f"--cluster {address}: Ray's client carries no streams; run 'proper serve --cluster auto' on a machine "
            "of the cluster"
        )
    folder = folder.resolve()
    with connected(address):
        room = devices(address)
        least, most = parse_replicas(replicas, room.count)
        settings = ReplicaSettings(least, most, drain_seconds=drain_seconds)
        resources = {"num_cpus": room.cpus, "num_gpus": room.gpus}
        with _deployed(folder, limits, settings, resources, room.threads) as handle:
            loaded = handle.options(method_name="model").remote().result()
            model = ClusterModel(folder, loaded)
            try:
                yield ClusterRunner(ClusterEngine(handle, model, loaded))
            finally:
                if model.store is not None:
                    model.store.close()


@contextmanager
def _deployed(
    folder: Path, limits: EngineLimits, settings: ReplicaSettings, resources: dict[str, float], threads: int
) -> Iterator[Any]:
    """Deploy replicas within the block, under the name of the run; yield their handle."""
    from ray import serve
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig

    from proper.cluster.user_router import UserRouter

    quiet = {"log_level": "WARNING"}
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    rows = limits.rows
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
    deployed: Any = serve.deployment(
        ray_actor_options=resources,
        max_ongoing_requests=max(1, round(settings.full * rows)),
        graceful_shutdown_timeout_s=settings.drain_seconds,
        request_router_config=RequestRouterConfig(request_router_class=cast(Any, UserRouter)),
        logging_config=quiet,
        **scaling,
    )(EngineReplica)
    name = f"proper-{folder.name}"
    # No HTTP server of Ray Serve's own: the routes, keys and limits are those of `proper serve`.
    serve.start(proxy_location="Disabled", logging_config=quiet)
    try:
        try:
            yield serve.run(deployed.bind(str(folder), limits, threads), name=name, route_prefix=None)
        except RuntimeError as error:
            raise ProperError(f"{folder}: the replicas do not start: {error}") from error
    finally:
        serve.delete(name)
