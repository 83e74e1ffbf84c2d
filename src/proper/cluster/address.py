"""Ray clusters: addresses, connection, and the resources for training."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from proper.errors import InputError, first_line
from proper.extras import needs_extra

_LOCAL = re.compile(r"local:([1-9]\d*)")


@dataclass(frozen=True)
class Devices:
    """The training processes that a cluster has room for: one per GPU or, without GPUs, one per node.

    Attributes:
        count: number of processes.
        cpus, gpus: resources that each of them reserves.
        threads: torch threads of each.
        per_node: most processes that share a machine's memory.
    """

    count: int
    cpus: float
    gpus: float
    threads: int
    per_node: int


def check_address(address: str) -> str:
    """Return the address of a cluster if it has a known form.

    Raises:
        InputError: it has not.
    """
    if address != "auto" and _LOCAL.fullmatch(address) is None and not address.startswith("ray://"):
        raise InputError(f"--cluster {address}: write auto, local:N (N >= 1) or ray://HOST:PORT")
    return address


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine for `local:N`, within the block.

    Raises:
        InputError: the address is unknown, or no cluster answers there.
        MissingExtraError: Ray is not installed.
    """
    check_address(address)
    with needs_extra("cluster", f"--cluster {address}"):
        import ray
    local = _LOCAL.fullmatch(address)
    settings: dict[str, Any] = {"log_to_driver": False, "include_dashboard": False, "configure_logging": False}
    try:
        if local is not None:
            ray.init(address="local", num_cpus=int(local[1]), **settings)
        else:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"--cluster {address}: no Ray cluster answers: {first_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def devices(address: str) -> Devices:
    """Return what the connected cluster has room for now; nodes that join later are counted by the next call."""
    import ray

    local = _LOCAL.fullmatch(address)
    if local is not None:
        count = int(local[1])
        return Devices(count, 1, 0, max(1, (os.cpu_count() or 1) // count), count)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    if any(gpus):
        return Devices(sum(gpus), 1, 1, 1, max(gpus))
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    least = min(filter(None, cpus), default=1)
    return Devices(max(1, sum(1 for each in cpus if each)), least, 0, least, 1)
