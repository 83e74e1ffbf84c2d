"""Does the simulation agree with the server? A small load on the real HTTP server, and the simulation of the same load.

python -m experiments.simulation [--repeats 3] [--requests 40] [--pad 0.3] [--json FILE]

Every repeat sends requests (Poisson arrivals, Zipf users) and simulates the same requests, as they reached the engine,
with the costs that the server's own work had meanwhile: its steps, prefills and loads are timed, their order and the
queue are not looked at. Times are those inside the server; those that the client saw are beside them.
The server is a process of its own with proper-nano and random adapters; answers never end early, so that their lengths
are known. Other load on the machine changes the costs within seconds, which no simulation foresees: `--pad` makes every
forward pass take at least so long, as that of a larger backbone would.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from experiments.simulation_client import Client, running_server
from experiments.simulation_server import MAX_ANSWER, MAX_PROMPT, ROWS, SLOTS, USERS, Work, read_log
from proper.benchmarks.measure import machine
from proper.benchmarks.serve_costs import line
from proper.files import write_json
from proper.simulation.activity import Arrival, ZipfLaw
from proper.simulation.costs import ServingCosts, step_table
from proper.simulation.figures import percentiles
from proper.simulation.replica import SimulatedReplica
from proper.simulation.schema import ClusterConfig
from proper.simulation.serving import serve_requests

SHORT_PROMPT = 8


def costs_of(work: Sequence[Work]) -> ServingCosts:
    """Return the costs that the server's work had: means, and the variation around them."""
    rest = statistics.fmean([each.seconds for each in work if each.kind == "rest"] or [0.0])
    steps: dict[int, list[float]] = {}
    for each in work:
        if each.kind == "step":
            steps.setdefault(each.size, []).append(each.seconds + rest)
    base, slope = line([(float(each.size), each.seconds) for each in work if each.kind == "prefill"])
    means = {size: statistics.fmean(found) for size, found in steps.items()}
    spread = [value / means[size] for size, found in steps.items() for value in found]
    loads = [each.seconds for each in work if each.kind == "load"]
    return ServingCosts(
        step_table(means, ROWS),
        base,
        slope,
        statistics.fmean(loads) if loads else 0.0,
        variation=statistics.pstdev(spread),
    )


def load(seed: int, count: int, rate: float) -> list[Arrival]:
    """Return `count` requests at `rate` a second, of Zipf users, with prompts and answers of many lengths."""
    draw = np.random.default_rng(seed)
    users = ZipfLaw(USERS, 0.9).draw(draw, count).tolist()
    times = np.cumsum(draw.exponential(1 / rate, count)).tolist()
    prompts = draw.integers(SHORT_PROMPT, MAX_PROMPT + 1, count).tolist()
    answers = draw.integers(2, MAX_ANSWER + 1, count).tolist()
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
    """Send the requests at their times; return the slot hit rate, and what the client saw."""
    before = await client.metrics()
    start = client.now() + 0.5
    done = await asyncio.gather(*(client.ask(r.user, r.prompt, r.answer, start + r.time) for r in requests))
    after = await client.metrics()
    hits = after["proper_slot_hits_total"] - before["proper_slot_hits_total"]
    return {
        "hit_rate": round(hits / len(requests), 4),
        "client_first_token_seconds": percentiles([each.first for each in done]),
    }


async def compare(url: str, log: Path, repeats: int, count: int, keep: Callable[[list[dict[str, Any]]], None]) -> None:
    """Call `keep` after each repeat with all so far: costs, figures of server and simulation, load of the machine."""
    found: list[dict[str, Any]] = []
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=200)) as http:
        client = Client(url, http)
        for repeat in range(repeats):
            start = read_log(log)[2]
            for user in range(1, SLOTS + 1):
                await client.ask(user, SHORT_PROMPT, 1)
            await asyncio.gather(*(client.ask(user, MAX_PROMPT, 4) for user in range(1, ROWS + 1)))
            now = costs_of(read_log(log, start)[0])
            # Half of what the rows could do, so that queues form and drain.
            rate = 0.5 / (now.prefill + now.prefill_token * 52 + 9 * now.steps[-1] / ROWS)
            requests, seen, start = load(repeat, count, rate), list(client.users), read_log(log)[2]
            server = await replay(client, requests)
            work, replies, _ = read_log(log, start)
            costs = costs_of(work)
            begun = replies[0].arrival
            received = [Arrival(each.arrival - begun, each.user, each.prompt, each.answer) for each in replies]
            server |= {
                "first_token_seconds": percentiles([each.first - each.arrival for each in replies]),
                "answer_seconds": percentiles([each.last - each.arrival for each in replies]),
            }
            found.append(
                {
                    "load_average": round(os.getloadavg()[0], 2),
                    "arrivals_per_second": round(rate, 3),
                    "costs": asdict(costs),
                    "server": server,
                    "simulation": simulated(received, costs, seen),
                }
            )
            keep(found)


def run(repeats: int, count: int, pad: float, out: Path | None) -> None:
    """Start the server, compare, stop it; write {"setting", "figures", "repeats"} after each repeat."""
    setting = {"machine": machine(), "users": USERS, "rows": ROWS, "slots": SLOTS, "requests": count, "pad": pad}

    def keep(found: list[dict[str, Any]]) -> None:
        result = {"setting": setting | {"backbone": "proper-nano, fp32"}, "figures": figures(found), "repeats": found}
        print(json.dumps(result["figures"]))
        if out is not None:
            write_json(out, result, shared=True)

    with tempfile.TemporaryDirectory(prefix="proper-simulation-") as folder, running_server(Path(folder), pad) as url:
        asyncio.run(compare(url, Path(folder) / "work.jsonl", repeats, count, keep))


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
    parser.add_argument("--requests", type=int, default=40, help="requests of a repeat")
    parser.add_argument("--pad", type=float, default=0.0, metavar="S", help="least seconds of a forward pass")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    run(arguments.repeats, arguments.requests, arguments.pad, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
