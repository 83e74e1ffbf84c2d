"""A cluster on this machine, from training to serving; a worker and a replica are killed: `make cluster-demo`.

    train    on two workers, one of which is killed, and the users again on one; their adapters must be the same
    serve    two replicas; 64 users at once must get what `proper generate` answers
    kill     one replica, while users ask and send interactions: no wrong answer, no acknowledged interaction lost

Prints what happened; the exit code is 1 if anything is wrong. Everything lies in a folder that must not exist yet.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import yaml
from cluster_processes import ENVIRONMENT, children, finished, proper, say, serving, until

from proper.adapters.store import AdapterStore
from proper.data.demo.generate import demo_run, write_demo
from proper.data.demo.users import DemoSettings
from proper.files import read_json, write_json
from proper.inference import load
from proper.inference.generate import generate
from proper.run_folder import RunFolder

BOUND = 1e-4
"""Largest difference of an adapter's tensor, relative to its norm, between two workers and one."""

# Neither dropout nor the constraint, which the processes of the shared stages draw for themselves.
SETTINGS = {
    "compute": {"dtype": "fp32", "device": "cpu", "max_length": 128, "checkpoint_seconds": 1},
    "population": {"epochs": 1, "max_tokens": 4096, "dropout": 0},
    "groups": {"epochs": 1, "max_tokens": 4096, "dropout": 0, "constraint": {"kind": "none"}},
    "users": {"steps": 4, "slots": 1, "storage": "fp32", "tiers": {"select": False}},
}
LENGTH = 16
"""Tokens of an answer."""


def main() -> int:
    """Run the demo and return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/cluster-demo"))
    parser.add_argument("--users", type=int, default=64)
    chosen = parser.parse_args()
    folder: Path = chosen.folder
    if folder.exists():
        print(f"{folder}: exists already", file=sys.stderr)
        return 2
    folder.mkdir(parents=True)
    begun = time.monotonic()
    with stores() as options:
        found: dict[str, Any] = {"training": trained(folder, chosen.users, options)}
        found["serving"] = served(folder / "two")
    results = folder / "two" / "results.json"
    write_json(results, {**(read_json(results) if results.exists() else {}), "cluster": found})
    wrong = [
        f"{part}: {name}" for part, checks in found.items() for name, right in checks["checks"].items() if not right
    ]
    say(f"{time.monotonic() - begun:.0f} s; {'all as it should be' if not wrong else 'WRONG: ' + '; '.join(wrong)}")
    return 1 if wrong else 0


@contextmanager
def stores() -> Iterator[list[str]]:
    """Start the servers for state that are installed; yield the options of `proper run` that use them."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    options: list[str] = []
    with ExitStack() as stack:
        from tests import postgresql_server, s3_server

        if postgresql_server.missing() is None:
            options += ["--store", stack.enter_context(postgresql_server.running())]
        if find_spec("moto") and find_spec("boto3"):
            server = stack.enter_context(s3_server.running())
            for environment in (ENVIRONMENT, os.environ):
                environment.update(server.environment)
            options += ["--store", f"s3://{server.new_bucket()}/two"]
        say(f"state of the run: {' '.join(options[1::2]) or 'SQLite and files in its folder'}")
        yield options


def trained(folder: Path, users: int, options: Sequence[str]) -> dict[str, Any]:
    """Train all stages on two workers, one of which is killed; the users again on one; and compare the adapters."""
    rows = write_demo(folder / "rows", DemoSettings(users=users, items=(10, 12)))
    config, two, one = folder / "demo.yaml", folder / "two", folder / "one"
    raw = {**demo_run(rows.resolve(), DemoSettings(users=users)), **SETTINGS}
    raw["split"]["min_history"] = 6
    config.write_text(yaml.safe_dump(raw), "utf-8")
    shared, cluster = ("--stages", "population,groups"), ("--cluster", "local:2")
    training = proper("run", str(config), "--out", str(two), "--stages", "population,groups,users", *cluster, *options)
    pieces = RunFolder(two).users.work / "final-pieces"
    until(lambda: any(pieces.glob("*/store/users.sqlite")) or training.poll() is not None)
    workers = children(training.pid, "ray::UserWorker")
    killed = bool(workers) and training.poll() is None
    if killed:
        os.kill(workers[0], signal.SIGKILL)
        say(f"killed worker {workers[0]} of {len(workers)}")
    finished(training)
    finished(proper("run", str(config), "--out", str(one), *shared, *cluster))
    finished(proper("run", str(config), "--out", str(one), "--stages", "users"))

    difference, count = largest_difference(one, two)
    say(f"{count} users: the adapters of two workers and of one differ by {difference:.1e} at most (bound {BOUND:.0e})")
    checks = {
        "the adapters are the same": difference <= BOUND,
        "all target users": count == raw["split"]["target_users"],
        "a worker was killed": killed,
    }
    return {"checks": checks, "difference": difference, "bound": BOUND, "users": count, "store": options[1::2]}


def largest_difference(one: Path, other: Path) -> tuple[float, int]:
    """Return the largest relative difference of any tensor of two runs' adapters, and the number of adapters."""
    worst, count = 0.0, 0
    with (
        closing(AdapterStore(RunFolder(one).users.path)) as first,
        closing(AdapterStore(RunFolder(other).users.path)) as second,
    ):
        users = [user for user, _ in first.users(None)]
        if users != [user for user, _ in second.users(None)]:
            return float("inf"), len(users)
        for user in users:
            mine, theirs = first.get(user), second.get(user)
            if mine is None or theirs is None or mine.tier != theirs.tier:
                return float("inf"), count
            if mine.adapter is None or theirs.adapter is None:
                continue
            count += 1
            for name, tensor in mine.adapter.items():
                worst = max(worst, float((theirs.adapter[name] - tensor).norm() / tensor.norm()))
    return worst, count


def served(run: Path) -> dict[str, Any]:
    """Serve a run with two replicas, compare their answers, and kill one of them."""
    with closing(AdapterStore(RunFolder(run).users.path)) as store:
        users = [user for user, _ in store.users(None)][:64]
    asked = [(user, f"Message {at} of the morning.\nTag:") for at, user in enumerate(users)]
    model = load(run)
    label = (model.config.task.labels or ["news"])[0]
    with closing(model):
        texts = generate(model, [prompt for _, prompt in asked], users, max_new_tokens=LENGTH)
    expected = dict(zip(users, texts, strict=True))
    with serving(run, "--rows", "16", "--cluster", "local:2") as (url, pid):
        with ThreadPoolExecutor(len(asked)) as threads:
            replies = list(threads.map(lambda each: complete(url, *each), asked))
        given = [text_of(reply) if reply.status_code == 200 else "" for reply in replies]
        right = sum(map(str.__eq__, given, texts))
        say(f"{right} of {len(asked)} users at once get what 'proper generate' answers")
        kill = with_a_kill(url, pid, asked, expected, label)
    return {**kill, "checks": {"answers of all users": right == len(asked), **kill["checks"]}}


def with_a_kill(
    url: str, pid: int, asked: Sequence[tuple[str, str]], expected: Mapping[str, str], label: str
) -> dict[str, Any]:
    """Kill a replica while users ask and send interactions; return what was answered, and whether it was right."""
    stop, statuses, wrong = threading.Event(), list[int](), list[str]()
    acknowledged: dict[str, int] = {}

    def ask(user: str, prompt: str) -> None:
        while not stop.is_set():
            reply = complete(url, user, prompt)
            statuses.append(reply.status_code)
            if reply.status_code == 200 and text_of(reply) != expected[user]:
                wrong.append(user)
            if reply.status_code not in (200, 503):
                wrong.append(f"{user}: {reply.status_code} {reply.text}")

    def tell(user: str) -> None:
        while not stop.is_set():
            number = acknowledged.get(user, 0) + 1
            row = {"id": f"{user}-new-{number}", "input": f"Message {number}", "output": label}
            reply = httpx.post(f"{url}/v1/users/{user}/interactions", json={"interactions": [row]}, timeout=60)
            if reply.status_code == 200:
                acknowledged[user] = number
            time.sleep(0.1)

    # The users who send interactions are others: a fit would change their answers.
    asking, telling = asked[:-4][:16], [user for user, _ in asked[-4:]]
    with ThreadPoolExecutor(len(asking) + len(telling)) as threads:
        work = [*(threads.submit(ask, *each) for each in asking), *(threads.submit(tell, user) for user in telling)]
        try:
            until(lambda: len(statuses) > 30)
            victim = children(pid, "ray::.*EngineReplica")[0]
            os.kill(victim, signal.SIGKILL)
            say(f"killed replica {victim}")
            until(lambda: victim not in children(pid, "ray::.*EngineReplica"))
            until(lambda: len(children(pid, "ray::.*EngineReplica")) == 2 and replicas(url) == 2)
            back = len(statuses)
            until(lambda: len(statuses) > back + 30)
        finally:
            stop.set()
        for each in work:
            each.result()
    stored = {user: httpx.get(f"{url}/v1/users/{user}", timeout=60).json()["interactions"] for user in telling}
    kept = all(stored[user] >= count for user, count in acknowledged.items()) and bool(acknowledged)
    say(f"{len(statuses)} answers around the kill: {len(wrong)} wrong, {statuses.count(503)} times 503")
    say(f"{sum(acknowledged.values())} interactions acknowledged, {sum(stored.values())} stored")
    checks = {"no wrong answer": not wrong, "no lost interaction": kept}
    return {"checks": checks, "answers": len(statuses), "retried": statuses.count(503), "interactions": stored}


def complete(url: str, user: str, prompt: str) -> httpx.Response:
    """Return the reply to a prompt of a user."""
    body = {"model": "two", "user": user, "prompt": prompt, "max_tokens": LENGTH}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=120)


def text_of(reply: httpx.Response) -> str:
    """Return the text of a completion."""
    return str(reply.json()["choices"][0]["text"])


def replicas(url: str) -> int:
    """Return the number of replicas that answer."""
    found = re.search(r"^proper_replicas (\S+)$", httpx.get(f"{url}/metrics", timeout=60).text, re.MULTILINE)
    return int(float(found[1])) if found else 0


if __name__ == "__main__":
    sys.exit(main())
