"""Request router of Ray Serve with affinity: a user's requests go to the replica that has the user's adapter in memory.

owner    by rendezvous hashing of (tenant, user): when replicas come or go, only the users of those replicas move
spill    when the owner is full, to the less loaded of two other replicas drawn at random (power of two choices)
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import xxhash
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from proper.inference.requests import Request


def score(tenant: str, user: str, replica: str) -> int:
    """Return the hash of a user and a replica; the replica with the highest one owns the user."""
    names = "".join(f"{len(name)}:{name}" for name in (tenant, user, replica))
    return xxhash.xxh3_64_intdigest(names.encode("utf-8", "surrogatepass"))


def ranked(request: Request | None, replicas: Sequence[str]) -> list[list[str]]:
    """Return the groups of replicas to try in order; of a group, the least loaded that is not full gets the request.

    Args:
        request: the request; without a user, or None, it has no owner.
        replicas: ids of the running replicas.
    """
    if not replicas:
        return []
    if request is None or request.user is None:
        return [random.sample(replicas, min(2, len(replicas)))]
    tenant, user = request.tenant, request.user
    owner = max(replicas, key=lambda replica: score(tenant, user, replica))
    others = [replica for replica in replicas if replica != owner]
    return [[owner], random.sample(others, min(2, len(others)))] if others else [[owner]]


class UserRouter(RequestRouter):
    """The router of a deployment whose calls have a `Request` as their first argument.

    Attributes:
        queue_len_response_deadline_s, max_queue_len_response_deadline_s: seconds that a full replica may take to tell
            its number of requests; longer than Ray Serve's own, because a step of the engine delays the answer.
    """

    queue_len_response_deadline_s = 1.0
    max_queue_len_response_deadline_s = 10.0

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas to try; see `ranked`."""
        request = None
        if pending_request is not None:
            # When all are full, Ray Serve waits before it asks again.
            pending_request.routing_context.should_backoff = True
            first = pending_request.args[0] if pending_request.args else None
            request = first if isinstance(first, Request) else None
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[by_id[name] for name in group] for group in ranked(request, sorted(by_id))]
