"""The walk of `test_walk.py`: every command that writes into a run folder, on users whose texts have marks."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import yaml

from proper.cli.app import main
from proper.data.demo import DemoSettings, demo_config, write_demo

SCOPES = "generate,write,admin"
SHORT = "users,shuffled,rag"
LONG = f"{SHORT},user-majority,groups-shared-e,population-more,oppu,users+rag,static-export,users-int8,per-user-only"
"""Methods with derived data and runs; the long walk, with a trained second seed, is slow."""
TRAINED = [f"zyz{at:02d}vax" for at in range(4)]
"""The marks of the users in the run's data."""
OFFLINE, ONLINE, IMPORTED, TENANT, LEFT, MANY = (f"zyz{at:02d}vax" for at in range(4, 10))
"""The marks of users who are added; the server deletes LEFT during the walk."""
MARKS = [*TRAINED, OFFLINE, ONLINE, IMPORTED, TENANT, LEFT, MANY]


@dataclass(frozen=True)
class Walk:
    """A run folder, the methods that are evaluated, and every command that was run, without its arguments."""

    run: Path
    methods: str = SHORT
    commands: set[str] = field(default_factory=set)

    def proper(self, command: str, *arguments: str | Path) -> str:
        """Run a command in this process, with the run folder as its first argument; return what it prints."""
        self.commands.add(command)
        with redirect_stdout(io.StringIO()) as printed:
            assert main([*command.split(), *map(str, arguments)]) == 0, command
        return printed.getvalue()


def walk_through(place: Path, methods: str, backbone: Path) -> Walk:
    """Run every command that writes into a run folder, at `place`, by the command line and over HTTP."""
    walk = Walk(place / "run", methods)
    seeds = [0] if walk.methods == SHORT else [0, 1]
    walk.proper("run", marked_data(place, walk.run, seeds, backbone), "--out", walk.run)
    shutil.copytree(walk.run, place / "other")
    if len(seeds) == 1:  # A further seed is a run folder with the data of the first.
        shutil.copytree(place / "other", walk.run / "seeds" / "1", ignore=shutil.ignore_patterns("data", "data.sqlite"))
    tenants = ("", "acme")
    keys = {each: walk.proper("keys add", walk.run, "--tenant", each, "--scopes", SCOPES).strip() for each in tenants}
    with serving(walk) as url:
        evaluate(walk, place / "other")
        teach_offline(walk, place)
        teach_online(url, keys)
    walk.proper("report", walk.run)
    walk.proper("users check", walk.run, "--repair")
    walk.proper("keys revoke", walk.run, walk.proper("keys list", walk.run).split()[0])
    return walk


def name(mark: str) -> str:
    """The id of a user, one that has to be escaped in JSON, HTML, URLs and file names."""
    return f"{mark} <ü>&'/🦊"


def texts(mark: str, count: int = 4) -> list[dict[str, str]]:
    """Interactions of a user."""
    return [{"input": f"{mark} says {at} {mark}", "output": "money now"} for at in range(count)]


def marked_data(place: Path, run: Path, seeds: list[int], backbone: Path) -> Path:
    """Write the demo's data with marks to the run folder, as `proper demo` does, and beside it; return a config."""
    settings = DemoSettings(users=len(TRAINED), groups=2, items=(6, 7))
    data = write_demo(run / "data", settings)
    rows = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    marks = dict(zip(dict.fromkeys(row["user_id"] for row in rows), TRAINED, strict=True))
    truth = (run / "data" / "truth.json").read_text("utf-8")
    for user, mark in marks.items():
        truth = truth.replace(f'"{user}', json.dumps(name(mark))[:-1])
    (run / "data" / "truth.json").write_text(truth, "utf-8")
    for row in rows:
        mark = marks[row["user_id"]]
        item = row["item_id"].replace(row["user_id"], name(mark))
        row |= {"user_id": name(mark), "input": f"{mark} {row['input']} {mark}", "item_id": item}
    rows += [row | {"item_id": f"{row['item_id']} again"} for row in rows[::3]]  # duplicates, which are dropped
    for path in (data, place / data.name):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    raw = demo_config(place / data.name, settings)
    raw["split"] |= {"target_users": len(TRAINED), "min_history": 2}
    short = {"max_tokens": 300, "epochs": 1}
    raw |= {
        "population": short,
        "groups": short | {"experts": 2, "rank": 3, "layers": 1, "user_embedding": 16},
        "compute": {"max_length": 64},
        "backbone": str(backbone),
    }
    raw |= {"users": {"epochs": 1, "rank": 2, "layers": 1, "tiers": {"select": False}}}
    raw |= {"evaluation": {"methods": ["users"], "seeds": seeds, "resamples": 100}}
    (place / "config.yaml").write_text(yaml.safe_dump(raw), "utf-8")
    return place / "config.yaml"


@contextmanager
def serving(walk: Walk) -> Iterator[str]:
    """Run the server and its worker as processes while the block runs; yields the URL."""
    walk.commands.add("serve")
    command = [sys.executable, "-m", "proper", "serve", str(walk.run), "--port", "0", "--rows", "2"]
    log = walk.run.with_name("serve.log")
    with log.open("wb") as stderr, subprocess.Popen(command, stderr=stderr) as server:
        try:
            while not (found := re.search(r"on (http://\S+)", log.read_text("utf-8"))):
                assert server.poll() is None, log.read_text("utf-8")
                time.sleep(0.1)
            yield found[1]
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
        finally:
            server.kill()


def evaluate(walk: Walk, other: Path) -> None:
    """Evaluate with derived runs and data, again without some predictions, and write all pages."""
    walk.proper("evaluate", walk.run, "--methods", walk.methods)
    (walk.run / "predictions" / "shuffled.json").unlink()
    walk.proper("evaluate", walk.run, "--methods", walk.methods)
    walk.proper("report", walk.run, *(word for mark in TRAINED for word in ("--user", name(mark))))
    walk.proper("report", walk.run, "--compare", other)


def teach_offline(walk: Walk, place: Path) -> None:
    """Enrol, update, ask, export and import by the command line, beside the server."""

    def rows(mark: str, **more: str) -> Path:
        file, dated = place / f"{mark}.jsonl", {"timestamp": "2024-01-01", **more}
        file.write_text("".join(json.dumps(row | dated) + "\n" for row in texts(mark)), "utf-8")
        return file

    walk.proper("users enrol", walk.run, "--user", name(OFFLINE), "--input", rows(OFFLINE))
    walk.proper("users enrol", walk.run, "--input", rows(MANY, user_id=name(MANY)))
    walk.proper("users update", walk.run)
    walk.proper("users update", walk.run, "--user", name(OFFLINE), "--input", rows(OFFLINE, output="sport now"))
    walk.proper("users drift", walk.run)
    walk.proper("generate", walk.run, "--user", name(OFFLINE), "--prompt", f"{OFFLINE}?")
    walk.proper("users export", walk.run, "--user", name(TRAINED[0]), "--out", place / "user")
    walk.proper("users export", walk.run, "--user", name(TRAINED[0]), "--out", place / "peft", "--format", "peft")
    for force in ((), ("--force",)):
        walk.proper("users import", walk.run, place / "user", "--user", name(IMPORTED), *force)
    # An import always makes a version, an update only one that is better.
    walk.proper("users rollback", walk.run, "--user", name(IMPORTED))
    walk.proper("users export", walk.run, "--all", "--out", place / "all", "--format", "peft")
    walk.proper("users archive", walk.run, "--user", name(OFFLINE), "--out", place / "archive.zip")
    walk.proper("groups show", walk.run)
    walk.proper("export-backbone", walk.run, "--out", place / "backbone")


def teach_online(url: str, keys: Mapping[str, str]) -> None:
    """Enrol users of two tenants, add feedback of a user of the run, wait for all fits, ask, delete one user."""
    with httpx.Client(base_url=url, timeout=120) as client:

        def ask(tenant: str, method: str, path: str, body: Any = None) -> Any:
            reply = client.request(method, path, json=body, headers={"Authorization": f"Bearer {keys[tenant]}"})
            assert reply.status_code == 200, reply.text
            return reply.json()

        def fitted(tenant: str, mark: str) -> None:
            while (state := ask(tenant, "GET", urls[mark])["fit"]["state"]) in ("queued", "fitting"):
                time.sleep(0.1)
            assert state == "done"

        taught = {ONLINE: "", TENANT: "acme", LEFT: "acme", TRAINED[1]: ""}
        urls = {mark: f"/v1/users/{quote(name(mark), safe='')}" for mark in taught}
        for mark in (ONLINE, TENANT, LEFT):
            ask(taught[mark], "POST", "/v1/users", {"user": name(mark), "interactions": texts(mark)})
        ask("", "POST", f"{urls[TRAINED[1]]}/interactions", {"interactions": texts(TRAINED[1])})
        for mark, tenant in taught.items():
            fitted(tenant, mark)
            asked = {"model": "run", "user": name(mark), "max_tokens": 2}
            ask(tenant, "POST", "/v1/completions", {**asked, "prompt": f"{mark} asks"})
            message = {"role": "user", "content": f"{mark} asks"}
            ask(tenant, "POST", "/v1/chat/completions", {**asked, "messages": [message]})
        ask("", "POST", f"{urls[ONLINE]}/interactions", {"interactions": [{"input": ONLINE, "output": "sport now"}]})
        fitted("", ONLINE)
        ask("acme", "DELETE", urls[LEFT])
