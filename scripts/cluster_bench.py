"""Cost of a cluster on one machine: a request through Ray Serve, and stage 3 on two workers at equal cores.

router   the same requests to a server without a cluster and to one with one replica, in turns
workers  stage 3 on one worker with two threads and on two workers with one each, in turns

python scripts/cluster_bench.py --json docs/results/bench/cluster.json
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import ray
import yaml
from cluster_demo import SETTINGS
from cluster_processes import ENVIRONMENT, finished, proper, say, serving, until

from proper.adapters.store import AdapterStore
from proper.benchmarks.measure import TimedSide, interleaved, machine
from proper.data.demo.generate import demo_run, write_demo
from proper.data.demo.users import DemoSettings
from proper.files import write_json
from proper.run_folder import RunFolder

USERS, TOGETHER = 32, 16
"""Users of the run, and requests at once where several are."""


def main() -> int:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    # All commands divide the cores themselves.
    ENVIRONMENT.pop("OMP_NUM_THREADS")
    with tempfile.TemporaryDirectory(prefix="proper-cluster-bench-") as scratch:
        folder = Path(scratch)
        workers, run = workers_compared(folder, chosen.repeats)
        figures = {**router_compared(run, chosen.requests), **workers}
    setting = {"backbone": "proper-nano", "machine": machine(), "ray": ray.__version__, "users": USERS}
    result = {"setting": {**setting, "requests": chosen.requests, "repeats": chosen.repeats}, "figures": figures}
    for name, value in figures.items():
        say(f"{name}: {value:.4g}")
    if chosen.json:
        write_json(chosen.json, result)
    return 0


def router_compared(run: Path, requests: int) -> dict[str, float]:
    """Time requests to a server of one process and to one in front of a replica, both with all cores."""
    with closing(AdapterStore(RunFolder(run).users.path)) as store:
        users = [user for user, _ in store.users(None)]

    def one(client: httpx.Client, url: str, at: int) -> None:
        body = {"model": run.name, "user": users[at % len(users)], "prompt": "Message of the morning.\nTag:"}
        client.post(f"{url}/v1/completions", json={**body, "max_tokens": 16}).raise_for_status()

    def several(client: httpx.Client, url: str, at: int) -> None:
        with ThreadPoolExecutor(TOGETHER) as threads:
            list(threads.map(lambda number: one(client, url, number), range(TOGETHER)))

    common = ("--rows", str(TOGETHER))
    with (
        serving(run, *common) as (direct, _),
        serving(run, *common, "--cluster", "local:1") as (cluster, _),
        httpx.Client(timeout=120) as client,
    ):
        sides = {"direct": direct, "cluster": cluster}
        alone = interleaved({name: TimedSide(partial(one, client, url)) for name, url in sides.items()}, requests)
        many = {name: TimedSide(partial(several, client, url)) for name, url in sides.items()}
        together = interleaved(many, max(5, requests // 5))
    pairs = list(zip(alone["direct"], alone["cluster"], strict=True))
    figures = {f"request_ms_{name}": 1000 * statistics.median(alone[name]) for name in sides}
    figures |= {f"requests_per_second_{name}": TOGETHER / statistics.median(together[name]) for name in sides}
    figures["request_overhead_ms"] = 1000 * statistics.median(cluster - direct for direct, cluster in pairs)
    figures["request_ratio"] = statistics.median(cluster / direct for direct, cluster in pairs)
    pairs = list(zip(together["direct"], together["cluster"], strict=True))
    figures["together_ratio"] = statistics.median(cluster / direct for direct, cluster in pairs)
    return figures


def workers_compared(folder: Path, repeats: int) -> tuple[dict[str, float], Path]:
    """Time stage 3 on one worker with all cores and on two with half of them; return also a run with users."""
    rows = write_demo(folder / "rows", DemoSettings(users=USERS))
    raw: dict[str, Any] = {**demo_run(rows.resolve(), DemoSettings(users=USERS)), **SETTINGS}
    raw["users"] = {"steps": 20, "tiers": {"select": False}}
    config, shared = folder / "bench.yaml", folder / "shared"
    config.write_text(yaml.safe_dump(raw), "utf-8")
    finished(proper("run", str(config), "--out", str(shared), "--stages", "population,groups"))
    seconds: dict[int, list[float]] = {1: [], 2: []}
    run = folder / "run"
    for at in range(2 * repeats):
        workers = (1, 2, 2, 1)[at % 4]  # neither is always first
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(shared, run)
        training = proper("run", str(config), "--out", str(run), "--stages", "users", "--cluster", f"local:{workers}")
        pieces = RunFolder(run).users.work / "final-pieces"
        until(lambda pieces=pieces: any(pieces.glob("*/store/users.sqlite")))
        begun = time.monotonic()
        finished(training)
        seconds[workers].append(time.monotonic() - begun)
    figures = {f"users_per_second_{workers}": USERS / statistics.median(taken) for workers, taken in seconds.items()}
    figures["workers_ratio"] = statistics.median(map(lambda a, b: a / b, seconds[1], seconds[2]))
    return figures, run


if __name__ == "__main__":
    sys.exit(main())
