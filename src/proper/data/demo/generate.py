"""Demo data generator: interactions, the planted truth behind them, and the config for a run on them.

The oracle answers are computed here; how much of them a run reaches is measured in `evaluation.truth`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from proper.data.demo.banks import Bank, Topic, draw, load_bank
from proper.data.demo.people import DemoUser, World, make_world, shuffled
from proper.data.demo.settings import DemoSettings
from proper.data.demo.truth import METRICS, PlantedTruth, compose, find_truth, own_plan
from proper.files import write_json, write_text
from proper.run_folder import RunFolder

_RUN = RunFolder(Path())
_SAMPLES = 2  # contents per topic over which the best styled answer is chosen
_KINDS = {"classification": "classification", "rating": "rating", "style": "generation"}


@dataclass(frozen=True, slots=True)
class Event:
    """One generated interaction before it is serialized."""

    person: DemoUser
    item: str
    day: date
    topic: int
    text: str
    content: str
    answer: str


def write_demo(folder: Path, settings: DemoSettings) -> Path:
    """Write `interactions.jsonl` and `truth.json` into `folder`; return the path of the interactions.

    `truth.json` holds `task`, `metric`, `n_groups`, `groups` (user to group) and `answers`: for each item the best
    answer of an oracle that knows only the population, also the author's group, also the author; never the noise.

    Raises:
        ProperError: the folder cannot be written.
    """
    bank = load_bank(settings.task)
    world = make_world(settings, max(1, len(bank.closings)))
    events = list(_events(settings, bank, world))
    path = folder / _RUN.demo_rows.name
    write_text(path, "".join(json.dumps(_row(event), ensure_ascii=False) + "\n" for event in events))
    rng = random.Random(f"{settings.task} truth {settings.seed}")
    contents = [[draw(topic, rng)[1] for _ in range(_SAMPLES)] for topic in bank.topics]
    truth = find_truth(settings.task, bank, world.people, contents)
    write_json(
        folder / _RUN.demo_truth.name,
        {
            "task": settings.task,
            "metric": METRICS[settings.task],
            "n_groups": settings.groups,
            "groups": {person.id: person.group for person in world.people},
            "answers": {event.item: _answers(bank, truth, event) for event in events},
        },
    )
    return path


def demo_config(path: Path, settings: DemoSettings) -> dict[str, Any]:
    """Return the data, task and split sections of a config for `path`, as plain values for `make_config`."""
    bank = load_bank(settings.task)
    kind = _KINDS[settings.task]
    answers: dict[str, Any] = {"max_new_tokens": 40} if kind == "generation" else {"labels": _labels(bank)}
    if settings.task == "classification":
        answers |= {"decode": "generate", "max_new_tokens": 8}  # faster than scoring the many labels
    return {
        "data": {"path": str(path), "format": "jsonl", "prompt": bank.prompt, "target": "{output}"},
        "task": {"kind": kind, **answers},
        "split": {"target_users": min(100, settings.people), "min_history": 10, "queries": 0.2, "by": "time"},
    }


def _labels(bank: Bank) -> list[str]:
    """Return all possible answers, in the bank's order."""
    said = [topic.templates[0].content for topic in bank.topics]
    return list(
        dict.fromkeys(compose(bank, (choice, None), what) for what in said for choice in range(len(bank.choices)))
    )


def _events(settings: DemoSettings, bank: Bank, world: World) -> Iterator[Event]:
    """Yield the interactions of all users, user by user, oldest first."""
    seen: set[str] = set()
    for person in world.people:
        rng = random.Random(f"{settings.task} {person.id} {settings.seed}")
        day = date(2023, 1, 1) + timedelta(days=rng.randrange(180))
        topics = _topics(world, settings.own_traits, rng)
        for number in range(1, rng.randint(*settings.items) + 1):
            topic = next(topics)
            day += timedelta(days=rng.randint(1, 6))
            text, content = _fresh(bank.topics[topic], rng, seen)
            choice, closing = own_plan(person, topic)
            if rng.random() < settings.noise:
                choice = rng.choice([other for other in range(len(bank.choices)) if other != choice])
            answer = compose(bank, (choice, closing), content)
            yield Event(person, f"{person.id}-{number:02d}", day, topic, text, content, answer)


def _topics(world: World, own_share: float, rng: random.Random) -> Iterator[int]:
    """Yield topics endlessly; shared and personal topics keep their shares over any period, each topic an equal one.

    A split by time therefore leaves every topic in the history, as far as its length allows.
    """
    shared, personal = shuffled(world.shared, rng), shuffled(world.personal, rng)
    owed = rng.random()
    while True:
        owed += own_share
        yield next(personal if owed >= 1 else shared)
        owed %= 1


def _fresh(topic: Topic, rng: random.Random, seen: set[str]) -> tuple[str, str]:
    """Draw a text that no user has had yet; after 20 tries accept a repeated one."""
    for _ in range(20):
        text, content = draw(topic, rng)
        if text not in seen:
            break
    seen.add(text)
    return text, content


def _row(event: Event) -> dict[str, str]:
    return {
        "user_id": event.person.id,
        "input": event.text,
        "output": event.answer,
        "timestamp": event.day.isoformat(),
        "item_id": event.item,
    }


def _answers(bank: Bank, truth: PlantedTruth, event: Event) -> dict[str, str]:
    plans = {
        "population": truth.population[event.topic],
        "groups": truth.groups[event.person.group][event.topic],
        "users": own_plan(event.person, event.topic),
    }
    return {knowledge: compose(bank, plan, event.content) for knowledge, plan in plans.items()}
