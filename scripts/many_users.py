"""Fit many simulated users with short histories, and record time and memory.

Each stage runs in a process of its own, so that each has a peak of its own. What a user has is 5 to 12 history items;
a fifth of their interactions are queries and not trained on. `memory_bytes` is what a stage's process held over its
time, looked at at equal distances.

    python scripts/many_users.py --users 10000 --out runs/many --json docs/results/bench/many-users.json

The same command again after a kill goes on where it stopped; seconds are then those of the last start.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from proper.adapters.store import AdapterStore
from proper.data.demo import DemoSettings, demo_config, write_demo
from proper.files import write_json

ITEMS = (7, 15)
"""Interactions of a person: 5 to 12 of them are history."""

SECONDS_BETWEEN = 1.0
"""How often memory is looked at."""

SAMPLES = 40
"""About so many of these looks are written down, at equal distances."""

TRAINING: dict[str, dict[str, Any]] = {
    "population": {"epochs": 1, "max_tokens": 20_000},
    "groups": {"epochs": 1, "batch_size": 48, "max_tokens": 40_000},
    "users": {"epochs": 2},
}


def main() -> None:
    """Make the data, run the stages, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", "--people", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("runs/many"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = prepare(options.out, options.users)
    figures: dict[str, Any] = {"people": options.users, "history_items": [5, 12], "machine": machine()}
    for stage in ("population", "groups", "users"):
        seconds, peak, held = timed(["run", str(config), "--out", str(options.out / "run"), "--stages", stage])
        figures[stage] = {"seconds": round(seconds, 1), "peak_memory_bytes": peak, "memory_bytes": held}
        print(f"{stage}: {seconds:.0f} s, at most {peak / 1e6:.0f} MB", flush=True)
    figures["tiers"] = tiers(options.out / "run")
    figures["users_per_hour"] = round(3600 * options.users / figures["users"]["seconds"])
    print(json.dumps(figures, indent=2))
    if options.json is not None:
        write_json(options.json, figures)


def prepare(folder: Path, users: int) -> Path:
    """Write the interactions and the config, once; return the config's path."""
    settings = DemoSettings(users=users, items=ITEMS)
    data, path = folder / "data" / "interactions.jsonl", folder / "config.yaml"
    if path.exists():
        return path
    write_demo(data.parent, settings)
    raw = {**demo_config(data.resolve(), settings), **TRAINING}
    raw["split"] |= {"target_users": users, "min_history": 5}
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return path


def timed(arguments: list[str]) -> tuple[float, int, list[int]]:
    """Run `proper` and return seconds, the most memory its process held, and what it held over time, in bytes."""
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-P", "-m", "proper", *arguments], stdout=subprocess.DEVNULL)
    held: list[int] = []
    ended = 0
    while not ended:
        time.sleep(0.25)
        ended, status, usage = os.wait4(child.pid, os.WNOHANG)
        if not ended and time.perf_counter() - started >= SECONDS_BETWEEN * (len(held) + 1):
            held.append(resident(child.pid))
    child.returncode = os.waitstatus_to_exitcode(status)  # `Popen` does not see what `wait4` has reaped.
    if status:
        sys.exit(f"proper {' '.join(arguments)}: failed")
    # Linux counts KiB, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    # At equal distances, the last one among them.
    return time.perf_counter() - started, usage.ru_maxrss * unit, held[:: -max(1, len(held) // SAMPLES)][::-1]


def resident(process: int) -> int:
    """Return the memory a process holds right now, in bytes; 0 where the system does not say."""
    path = Path(f"/proc/{process}/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0


def tiers(run: Path) -> dict[str, Any]:
    """Return how many users are on which tier, and why."""
    store = AdapterStore(run / "users")
    held = [(tier, str(metadata.get("reason"))) for _, tier, metadata, _ in store.metadata()]
    store.close()
    counts = Counter(tier for tier, _ in held)
    return {**counts, "reasons": dict(Counter(reason for _, reason in held).most_common())}


def machine() -> str:
    """Return what the figures were taken on."""
    return f"{platform.machine()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
