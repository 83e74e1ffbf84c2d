"""Slow, obvious simulation of one replica: every decoding step alone, no event queue. The oracle of `replica.py`."""

from __future__ import annotations

from collections.abc import Sequence

from proper.simulation.activity import Arrival
from proper.simulation.costs import ServingCosts
from proper.simulation.schema import ClusterConfig


def by_single_steps(
    requests: Sequence[Arrival], cluster: ClusterConfig, costs: ServingCosts
) -> list[tuple[bool, float, float]]:
    """Return (hit, time of the first token, time of the last token) of each request, whose key is its user."""
    found = [(False, 0.0, 0.0)] * len(requests)
    passed = [0] * len(requests)
    now, loader_free = 0.0, 0.0
    arrived, waiting, running = 0, list[int](), dict[int, int]()
    slots, loading = list[int](), dict[int, float]()  # least recently used first

    def accept() -> None:
        nonlocal arrived
        while arrived < len(requests) and requests[arrived].time <= now:
            found[arrived] = (requests[arrived].user in slots, 0.0, 0.0)
            waiting.append(arrived)
            arrived += 1

    def collect() -> None:
        for user in [user for user, end in loading.items() if end <= now]:
            del loading[user]
            slots.append(user)

    def prefetch() -> None:
        nonlocal loader_free
        keep: set[int] = set()
        pinned = {requests[at].user for at in running}
        for at in waiting:
            user = requests[at].user
            if len(keep) == cluster.slots:
                return
            if user not in slots and user not in loading:
                if len(slots) + len(loading) == cluster.slots:
                    victim = next((each for each in slots if each not in pinned and each not in keep), None)
                    if victim is None:
                        return
                    slots.remove(victim)
                loader_free = max(loader_free, now) + costs.load
                loading[user] = loader_free
            keep.add(user)

    def take() -> list[int]:
        taken, unready, longest = list[int](), list[int](), 0
        for at in waiting:
            width = max(longest, requests[at].prompt)
            if len(taken) == cluster.rows - len(running):
                break
            if taken and width * (len(taken) + 1) > cluster.prefill_tokens:
                break
            if any(passed[other] >= cluster.patience for other in unready):
                break
            if requests[at].user not in slots:
                unready.append(at)
                continue
            for other in unready:
                passed[other] += 1
            taken.append(at)
            longest = width
        return taken

    while arrived < len(requests) or waiting or running:
        accept()
        collect()
        prefetch()
        if running:
            now += costs.steps[len(running) - 1]
            for at in list(running):
                running[at] -= 1
                if not running[at]:
                    del running[at]
                    found[at] = (*found[at][:2], now)
            accept()
            collect()
        elif not any(requests[at].user in slots for at in waiting):
            nexts = [*loading.values()] + ([requests[arrived].time] if arrived < len(requests) else [])
            now = max(now, min(nexts))
            continue
        taken = take()
        if taken:
            for at in taken:
                waiting.remove(at)
                slots.remove(requests[at].user)
                slots.append(requests[at].user)
            now += costs.prefill + costs.prefill_token * max(requests[at].prompt for at in taken) * len(taken)
            for at in taken:
                found[at] = (found[at][0], now, now)
                if requests[at].answer > 1:
                    running[at] = requests[at].answer - 1
    return found
