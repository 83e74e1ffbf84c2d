"""Does the simulation agree with the server? A small load on the real HTTP server, and the simulation of the same load.

python -m experiments.simulation [--repeats 3] [--requests 80] [--json docs/results/bench/simulation-check.json]

Every repeat measures the costs through the server's own HTTP interface, replays requests (Poisson arrivals, Zipf
users), measures the costs again, and simulates the same requests with the costs of that repeat. The server is a process
of its own with proper-nano and random adapters; answers never end early, so that their lengths are known. Other load
on the machine changes the costs from minute to minute: the comparison is paired, and the result says what the load was.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from experiments.simulation_client import Client, running_server
from experiments.simulation_server import LONGEST_ANSWER, LONGEST_PROMPT, ROWS, SLOTS, USERS
from proper.benchmarks.measure import machine
from proper.files import write_json
from proper.simulation.activity import Arrival, ZipfLaw
from proper.simulation.costs import ServingCosts, step_table
from proper.simulation.figures import percentiles
from proper.simulation.replica import SimulatedReplica
from proper.simulation.schema import ClusterConfig
from proper.simulation.serving import serve_requests

SHORT_PROMPT = 8


async def calibrate(client: Client, rounds: int) -> list[tuple[str, float]]:
    """Return measurements by kind: "warm 8" (first token of a short prompt, in a slot), "cold 8", "step 2", ..."""
    found: list[tuple[str, float]] = []
    for at in range(rounds):
        await client.ask(1, SHORT_PROMPT, 1)
        before = await client.metrics()
        warm = [(size, (await client.ask(1, size, 1)).first) for size in 3 * (SHORT_PROMPT, LONGEST_PROMPT)]
        after = await client.metrics()
        inside = after["proper_first_token_seconds_sum"] - before["proper_first_token_seconds_sum"]
        found += [(f"warm {size}", seconds) for size, seconds in warm]
        found.append(("request", max(0.0, (sum(seconds for _, seconds in warm) - inside) / len(warm))))
        # More users than slots since: this one's adapter has left its slot.
        for user in range(SLOTS + 2):
            one = await client.ask(2 + (user + at * 5) % (USERS - 2), SHORT_PROMPT, 1)
            found.append((f"cold {SHORT_PROMPT}", one.first))
        for rows in range(1, ROWS + 1):
            for user in range(1, rows + 1):
                await client.ask(user, SHORT_PROMPT, 1)
            answers = await asyncio.gather(
                *(client.ask(user, SHORT_PROMPT, LONGEST_ANSWER) for user in range(1, rows + 1))
            )
            for one in answers:
                gaps = np.diff(one.stamps)[1:]
                found += [(f"step {rows}", float(gap)) for gap in gaps]
    return found


def costs_of(measured: list[tuple[str, float]]) -> ServingCosts:
    """Return the costs of a repeat: means, so that delays by other load count as in the replay."""
    kinds: dict[str, list[float]] = {}
    for kind, value in measured:
        kinds.setdefault(kind, []).append(value)
    mean = {kind: statistics.fmean(values) for kind, values in kinds.items()}
    short, long = mean[f"warm {SHORT_PROMPT}"], mean[f"warm {LONGEST_PROMPT}"]
    slope = max(0.0, (long - short) / (LONGEST_PROMPT - SHORT_PROMPT))
    steps = {rows: mean[f"step {rows}"] for rows in range(1, ROWS + 1)}
    gaps = [value / mean[kind] for kind, values in kinds.items() if kind.startswith("step") for value in values]
    return ServingCosts(
        step_table(steps, ROWS),
        max(0.0, short - mean["request"] - slope * SHORT_PROMPT),
        slope,
        max(0.0, mean[f"cold {SHORT_PROMPT}"] - short),
        request=mean["request"],
        variation=statistics.pstdev(gaps),
    )


def load(seed: int, count: int, rate: float) -> list[Arrival]:
    """Return `count` requests at `rate` a second, of Zipf users, with prompts and answers of many lengths."""
    draw = np.random.default_rng(seed)
    users = ZipfLaw(USERS, 0.9).draw(draw, count).tolist()
    times = np.cumsum(draw.exponential(1 / rate, count)).tolist()
    prompts = draw.integers(SHORT_PROMPT, LONGEST_PROMPT + 1, count).tolist()
    answers = draw.integers(2, LONGEST_ANSWER + 1, count).tolist()
    return [Arrival(*each) for each in zip(times, users, prompts, answers, strict=True)]


def simulated(requests: list[Arrival], costs: ServingCosts, users: list[int], seeds: int = 20) -> dict[str, Any]:
    """Return the figures of the simulation of these requests, over several draws of the variation of times.

    Args:
        requests: the requests.
        costs: the measured costs.
        users: whom the server answered before; the last ones' adapters are in its slots.
        seeds: number of draws.
    """
    resident = list(dict.fromkeys(reversed(users)))[:SLOTS]

    def prepare(number: int, machine: SimulatedReplica) -> None:
        for user in reversed(resident):
            machine.slots.add(user)

    cluster = ClusterConfig(replicas=1, rows=ROWS, slots=SLOTS)
    jobs = [
        job
        for seed in range(seeds)
        for job in serve_requests(
            requests, cluster, costs, lambda user: user, replicas=1, seed=seed, prepare=prepare
        ).jobs
    ]
    return {
        "hit_rate": round(statistics.fmean(job.hit for job in jobs), 4),
        "first_token_seconds": percentiles([costs.request + job.first - job.arrival for job in jobs]),
        "answer_seconds": percentiles([costs.request + job.ended - job.arrival for job in jobs]),
    }


async def replay(client: Client, requests: list[Arrival]) -> dict[str, Any]:
    """Send the requests at their times; return the figures of the server."""
    before = await client.metrics()
    start = client.now() + 0.5
    done = await asyncio.gather(*(client.ask(r.user, r.prompt, r.answer, start + r.time) for r in requests))
    after = await client.metrics()
    hits = after["proper_slot_hits_total"] - before["proper_slot_hits_total"]
    return {
        "hit_rate": round(hits / len(requests), 4),
        "first_token_seconds": percentiles([each.first for each in done]),
        "answer_seconds": percentiles([each.stamps[-1] for each in done]),
    }


async def compare(
    url: str, repeats: int, count: int, rounds: int, keep: Callable[[list[dict[str, Any]]], None]
) -> None:
    """Call `keep` after each repeat with all so far: costs, figures of server and simulation, load of the machine."""
    found: list[dict[str, Any]] = []
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=200)) as http:
        client = Client(url, http)
        await calibrate(client, 1)  # warm-up
        for repeat in range(repeats):
            measured = await calibrate(client, rounds)
            costs = costs_of(measured)
            # Half of what the rows could do, so that queues form and drain.
            seconds = costs.prefill + costs.prefill_token * 50 + 9 * costs.steps[-1] / ROWS
            requests = load(repeat, count, 0.5 / seconds)
            seen = list(client.users)
            server = await replay(client, requests)
            costs = costs_of(measured + await calibrate(client, rounds))
            found.append(
                {
                    "load_average": round(os.getloadavg()[0], 2),
                    "arrivals_per_second": round(0.5 / seconds, 3),
                    "costs": asdict(costs),
                    "server": server,
                    "simulation": simulated(requests, costs, seen),
                }
            )
            keep(found)


def run(repeats: int, count: int, rounds: int, out: Path | None) -> None:
    """Start the server, compare, stop it; write {"setting", "figures", "repeats"} after each repeat."""
    setting = {"machine": machine(), "users": USERS, "rows": ROWS, "slots": SLOTS, "requests": count, "rounds": rounds}

    def keep(found: list[dict[str, Any]]) -> None:
        result = {"setting": setting | {"backbone": "proper-nano, fp32"}, "figures": figures(found), "repeats": found}
        print(json.dumps(result["figures"]))
        if out is not None:
            write_json(out, result, shared=True)

    with tempfile.TemporaryDirectory(prefix="proper-simulation-") as folder, running_server(Path(folder)) as url:
        asyncio.run(compare(url, repeats, count, rounds, keep))


def figures(repeats: list[dict[str, Any]]) -> dict[str, float]:
    """Return simulation over server, the median of the repeats: hit rate, p50 and p95 of first token and answer."""

    def over(*names: str) -> float:
        ratios = []
        for repeat in repeats:
            ours, theirs = repeat["simulation"], repeat["server"]
            for name in names:
                ours, theirs = ours[name], theirs[name]
            ratios.append(ours / theirs if theirs else float(ours == theirs))
        return round(statistics.median(ratios), 3)

    return {
        "hit_rate_over_server": over("hit_rate"),
        "first_token_p50_over_server": over("first_token_seconds", "p50"),
        "first_token_p95_over_server": over("first_token_seconds", "p95"),
        "answer_p50_over_server": over("answer_seconds", "p50"),
        "answer_p95_over_server": over("answer_seconds", "p95"),
    }


def main() -> int:
    """Parse the command line, run the comparison and write its result; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.simulation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=80, help="requests of a repeat")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of measuring costs before and after each repeat")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    run(arguments.repeats, arguments.requests, arguments.rounds, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
