"""A run folder of generated plain files: no model, hostile text, and numbers that the tests look for."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from proper.reports import write_report

USERS = 60
EXPERTS = 5
HOSTILE = [
    '<script>window.hacked = 1</script> & "quotes"',
    "مرحبا بالعالم، هذا نص من اليمين إلى اليسار",
    "🎉 emoji 👩‍🔬 \u202eoverride and a</div></section> tag",
    "<img src=http://evil.example/x.png onerror=alert(1)>",
]


def user_name(index: int) -> str:
    return {3: "<b>u3</b>", 4: "مستخدم", 5: "u5 🎈"}.get(index, f"u{index}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_run(tmp_path)
    return tmp_path


@pytest.fixture
def change(folder: Path) -> Callable[[Callable[[dict[str, Any]], None]], None]:
    """Edit results.json in place."""

    def edit(with_: Callable[[dict[str, Any]], None]) -> None:
        value = json.loads((folder / "results.json").read_text())
        with_(value)
        (folder / "results.json").write_text(json.dumps(value))

    return edit


def write_run(folder: Path) -> None:
    rng = random.Random(0)
    people = [_person(index, rng) for index in range(USERS)]
    (folder / "results.json").write_text(json.dumps(results()))
    write_lines(folder / "metrics.jsonl", _steps(rng))
    (folder / "routing.json").write_text(json.dumps({"users": [_routed(p, rng) for p in people]}))
    shown = {"metric": "accuracy", "higher_is_better": True, "users": [p["gains"] for p in people]}
    (folder / "users.json").write_text(json.dumps(shown))
    for method, right in (("population", 0.5), ("groups", 0.6), ("users", 0.7)):
        write_lines(folder / "predictions" / f"{method}.jsonl", _predictions(method, right))


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def results() -> dict[str, Any]:
    history = {"min": 10, "median": 41.5, "max": 310}
    return {
        "schema": 1,
        "run": {
            "backbone": "proper-nano",
            "seeds": [0, 1],
            "versions": {"torch": "2.13.0", "proper": "0.1.0"},
            "data_sha256": "abc123def",
            "device": "cpu, 2 threads",
            "seconds": {"population": 61.2, "groups": 45.0},
        },
        "task": {"name": "notes", "kind": "classification", "target_users": USERS, "queries": 300, "history": history},
        "metrics": _metrics(),
        "comparisons": _comparisons(),
        "cost": [
            {"method": "groups", "parameters_per_user": 128, "bytes_per_user": 512, "train_seconds_per_user": 0.0123},
            {
                "method": "users",
                "parameters_per_user": 12345,
                "bytes_per_user": 24690,
                "train_seconds_per_user": 1.84,
                "tokens_per_second": 5120.0,
            },
        ],
        "routing": {
            "experts": EXPERTS,
            "utilization": [0.2] * EXPERTS,
            "entropy": 1.21,
            "user_expert_mutual_information": 0.432,
            "constraint_cosine": 0.712,
        },
        "slices": [
            {"slice": "history-q1", "method": method, "metric": "accuracy", "value": value, "ci95": [0.4, 0.8],
             "users": 15, "history": [10, 19]}
            for method, value in (("population", 0.4321), ("groups", 0.5432), ("users", None))
        ],
        "signatures": ["Stage 3 is worse than stage 2 for 9 of 60 users & <i>more</i>."],
        "truth": {
            "allowed": {"population": 0.5, "groups": 0.65, "users": 0.8},
            "measured": {"population": 0.512, "groups": 0.583, "users": 0.641},
            "won": {"groups": 0.517, "users": -0.04},
            "nmi": 0.876,
        },
        "tiers": {"population": 2, "groups": 14, "users": 44, "reasons": {"no gain on own history": 14}},
    }  # fmt: skip


def _metrics() -> list[dict[str, Any]]:
    values = {
        "accuracy": {"base": 0.21, "population": 0.512, "groups": 0.583, "users": 0.641, "oppu": 0.59},
        "loss": {"population": 1.31, "groups": 1.12, "users": None},
    }
    return [
        {
            "task": "notes",
            "method": method,
            "metric": metric,
            "value": value,
            "value_users": value,
            "ci95": None if value is None or method == "oppu" else [value - 0.04, value + 0.04],
            "users": USERS,
            "queries": 300,
            "seeds": 2,
            "higher_is_better": metric == "accuracy",
            "primary": metric == "accuracy",
        }
        for metric, methods in values.items()
        for method, value in methods.items()
    ]


def _comparisons() -> list[dict[str, Any]]:
    steps = [("groups", "population", 0.071, 0.139, [0.03, 0.11], 0.0004, 0.0008),
             ("users", "groups", 0.058, 0.099, [-0.004, 0.12], 0.062, 0.062)]  # fmt: skip
    return [
        {
            "task": "notes",
            "method": method,
            "against": against,
            "metric": "accuracy",
            "difference": difference,
            "relative": relative,
            "ci95": ci95,
            "p_value": p,
            "p_adjusted": adjusted,
            "family": "primary",
            "test": "paired permutation over users",
            "primary": True,
        }
        for method, against, difference, relative, ci95, p, adjusted in steps
    ]


def _person(index: int, rng: random.Random) -> dict[str, Any]:
    history = int(10 * 1.06**index)
    tier = "groups" if index % 5 == 0 else "users"
    gain = 0.0 if tier == "groups" else round(rng.gauss(0.002 * index - 0.03, 0.08), 3)
    gains = {
        "user": user_name(index),
        "history": history,
        "queries": 5,
        "tier": tier,
        "values": {"population": 0.5, "groups": None if index == 7 else 0.6, "users": 0.6 + gain},
        "gain_groups": None if index == 7 else round(rng.gauss(0.07, 0.1), 3),
        "gain_users": gain,
    }
    return {"index": index, "history": history, "gains": gains}


def _routed(person: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    index = person["index"]
    group = index % EXPERTS
    raw = [math.exp(rng.gauss(1.7 if expert == group else 0, 0.4)) for expert in range(EXPERTS)]
    gates = [gate / sum(raw) for gate in raw]
    angle = 2 * math.pi * group / EXPERTS
    x, y = math.cos(angle) + rng.gauss(0, 0.25), math.sin(angle) + rng.gauss(0, 0.25)
    main = max(range(EXPERTS), key=gates.__getitem__)
    place = {"x": None, "y": None} if index == 9 else {"x": x, "y": y}
    return {
        "user": user_name(index),
        "history": person["history"],
        "gates": gates,
        "main": main,
        **place,
        "group": group,
    }


def _steps(rng: random.Random) -> Iterable[dict[str, Any]]:
    for stage, start in (("population", 3.2), ("groups", 2.1), ("users", 1.7), ("router", 1.6)):
        for seed in (0, 1):
            for step in range(1, 301):
                loss = start * (0.6 + 0.4 * math.exp(-step / 60)) + rng.gauss(0, 0.08)
                constraint = 0.95 - 0.001 * step if stage == "groups" else None
                yield {"stage": stage, "seed": seed, "step": step, "epoch": step / 100, "loss": loss, "tokens": 900,
                       "learning_rate": 1e-3 * (1 - step / 301), "constraint": constraint, "unknown": {}}  # fmt: skip
    yield {"stage": "users", "user": "u1", "validation": [1.0, None]}


def _predictions(method: str, right: float) -> Iterable[dict[str, Any]]:
    rng = random.Random(method)
    labels = ["cooking", "travel", "science", "sport"]
    for number in range(300):
        index = number % USERS
        target = labels[number % 4]
        said = target if rng.random() < right else labels[(number + 1) % 4]
        prompt = f"{HOSTILE[number % 4]} A note number {number}, which somebody wrote on a long evening.\nCategory:"
        yield {"id": number, "user": user_name(index), "item": None, "prompt": prompt, "target": target,
               "prediction": "" if number == 8 else said, "loss": None if number == 9 else 1.25, "tokens": 4,
               "tier": "groups" if index % 5 == 0 else "users", "history": int(10 * 1.06**index)}  # fmt: skip


class Page(HTMLParser):
    """A parsed report: the text and tooltips of each section, all tags with attributes, and whether tags match."""

    VOID = {"meta", "link", "img", "br", "input"}

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text: dict[str, str] = {}
        self.tips: dict[str, list[str]] = {}
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self._place = "head"
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in {"section", "header", "footer"}:
            self._place = attributes.get("id", tag)
        if "data-tip" in attributes:
            self.tips.setdefault(self._place, []).append(attributes["data-tip"])

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> does not match"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"style", "script"}:
            self.text[self._place] = self.text.get(self._place, "") + data.replace("\u00a0", " ")

    def count(self, tag: str, **attributes: str) -> int:
        """How many tags have these attributes (`class_` for class)."""
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return sum(name == tag and wanted.items() <= found.items() for name, found in self.tags)


@pytest.fixture
def render(folder: Path) -> Callable[[], Page]:
    """Write the report of `folder` and parse it."""
    return lambda: Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture
def parse() -> Callable[[Path], Page]:
    """Parse a page that was written."""
    return lambda path: Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def hostile_ids() -> list[str]:
    """The user ids of the run that are no file names."""
    return [user_name(index) for index in (3, 4, 5)]
