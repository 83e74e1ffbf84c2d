"""Demo data generator: interactions, the planted truth behind them, and the config for a run on them.

Oracle answers are the best answers given knowledge of the population, the group or the user. "Knowledge" means the
exact share of users who answer in each way, without noise. The best answer depends on the metric: the likeliest label,
the median rating, the text with the highest expected ROUGE-1. How much of them a run reaches is measured in
`evaluation.truth`.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import lru_cache
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from proper.data.demo.banks import Bank, Topic, draw, load_bank, sentence
from proper.data.demo.users import DemoSettings, DemoTask, DemoUser, World, make_world, shuffled
from proper.files import write_json, write_text
from proper.run_folder import STAGE_METHODS, RunFolder

_RUN = RunFolder(Path())
_SAMPLES = 2  # contents per topic over which the best styled answer is chosen
_KINDS = {"classification": "classification", "rating": "rating", "style": "generation"}

Plan = tuple[int | None, int | None]  # indices of an answer's choice and sign-off; None leaves it out

METRICS: Mapping[DemoTask, str] = {"classification": "accuracy", "rating": "mae", "style": "rouge1"}

# Settings of the demo: small budgets, larger learning rates and batches, so that it ends soon. Stage 2 makes several
# passes over the target users' histories: one pass over everyone's costs as much, and moves each embedding as rarely.
# Stages 2 and 3 adapt the upper half of the 8 layers, so that the lower half is computed once per text.
TRAINING: dict[str, dict[str, Any]] = {
    "population": {"epochs": 1, "max_tokens": 60_000, "dropout": 0, "patience": 0},
    "groups": {
        "train_on": "targets",
        "layers": 4,
        "epochs": 7,
        "batch_size": 32,
        "learning_rate": 4e-3,
        "user_embedding": 16,
        "embedding_learning_rate": 1e-1,
        "dropout": 0,
    },
    "users": {"layers": 4, "epochs": 3, "batch_size": 4, "learning_rate": 5e-3, "scales": [0.5]},
}
TARGET_USERS = 50


@dataclass(frozen=True, slots=True)
class Event:
    """One generated interaction before it is serialized."""

    user: DemoUser
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
    truth = find_truth(settings.task, bank, world.users, contents)
    write_json(
        folder / _RUN.demo_truth.name,
        {
            "task": settings.task,
            "metric": METRICS[settings.task],
            "n_groups": settings.groups,
            "groups": {user.id: user.group for user in world.users},
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
        "split": {"target_users": min(100, settings.users), "min_history": 10, "queries": 0.2, "by": "time"},
    }


def demo_run(path: Path, settings: DemoSettings) -> dict[str, Any]:
    """Return the config of `proper demo` for the data in `path`, as plain values for `make_config`."""
    raw = demo_config(path, settings)
    raw["split"]["target_users"] = min(TARGET_USERS, settings.users)
    evaluation = {"methods": list(map(str, STAGE_METHODS)), "seeds": [settings.seed]}
    return {**raw, **TRAINING, "evaluation": evaluation}


def _labels(bank: Bank) -> list[str]:
    """Return all possible answers, in the bank's order."""
    contents = [topic.templates[0].content for topic in bank.topics]
    plans = [(choice, None) for choice in range(len(bank.choices))]
    return list(dict.fromkeys(compose(bank, plan, content) for content in contents for plan in plans))


def _events(settings: DemoSettings, bank: Bank, world: World) -> Iterator[Event]:
    """Yield the interactions of all users, user by user, oldest first."""
    seen: set[str] = set()
    for user in world.users:
        rng = random.Random(f"{settings.task} {user.id} {settings.seed}")
        day = date(2023, 1, 1) + timedelta(days=rng.randrange(180))
        topics = _topics(world, settings.own_traits, rng)
        for number in range(1, rng.randint(*settings.items) + 1):
            topic = next(topics)
            day += timedelta(days=rng.randint(1, 6))
            text, content = _fresh(bank.topics[topic], rng, seen)
            choice, closing = own_plan(user, topic)
            if rng.random() < settings.noise:
                choice = rng.choice([other for other in range(len(bank.choices)) if other != choice])
            answer = compose(bank, (choice, closing), content)
            yield Event(user, f"{user.id}-{number:02d}", day, topic, text, content, answer)


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
        "user_id": event.user.id,
        "input": event.text,
        "output": event.answer,
        "timestamp": event.day.isoformat(),
        "item_id": event.item,
    }


def _answers(bank: Bank, truth: PlantedTruth, event: Event) -> dict[str, str]:
    plans = {
        "population": truth.population[event.topic],
        "groups": truth.groups[event.user.group][event.topic],
        "users": own_plan(event.user, event.topic),
    }
    return {knowledge: compose(bank, plan, event.content) for knowledge, plan in plans.items()}


@dataclass(frozen=True, slots=True)
class PlantedTruth:
    """Best plans per topic: for an unknown user, and for a member of each group."""

    population: tuple[Plan, ...]
    groups: Mapping[int, tuple[Plan, ...]]


def find_truth(
    task: DemoTask, bank: Bank, users: Sequence[DemoUser], contents: Sequence[Sequence[str]]
) -> PlantedTruth:
    """Compute the best plans for the population and for each group.

    Args:
        task: determines the metric of an answer, see `worth`.
        bank: the task's phrases.
        users: all users, with equal weight.
        contents: per topic a few contents of answers; a plan's value is its mean `worth` over them.
    """
    worths = [_worths(task, bank, some) for some in contents]
    groups = sorted({user.group for user in users})

    def best(knows: Sequence[DemoUser]) -> tuple[Plan, ...]:
        return tuple(_best(worth, Counter(own_plan(p, topic) for p in knows)) for topic, worth in enumerate(worths))

    return PlantedTruth(best(users), {group: best([p for p in users if p.group == group]) for group in groups})


def own_plan(user: DemoUser, topic: int) -> Plan:
    """Return a user's plan for a topic, without noise."""
    return user.habit[topic], user.closing


def compose(bank: Bank, plan: Plan, content: str) -> str:
    """Compose an answer: content and choice, or opening, content and sign-off."""
    choice, closing = plan
    opening = "" if choice is None else bank.choices[choice]
    if not bank.closings:
        return f"{content} {opening}".strip()
    ending = "" if closing is None else bank.closings[closing]
    return " ".join(part for part in (opening, content if opening else sentence(content), ending) if part)


def rouge1(answer: str, gold: str) -> float:
    """Return the ROUGE-1 F-measure, as `rouge_score` computes it without a stemmer."""
    left, right = _words(answer), _words(gold)
    return 2 * (left & right).total() / max(1, left.total() + right.total())


@lru_cache(maxsize=1024)
def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"[a-z0-9]+", text.lower()))


def worth(task: DemoTask, answer: str, gold: str) -> float:
    """Return the value of an answer, higher is better: 1 for the right label, minus the absolute error, or ROUGE-1."""
    if task == "style":
        return rouge1(answer, gold)
    return -abs(float(answer) - float(gold)) if task == "rating" else float(answer == gold)


def _worths(task: DemoTask, bank: Bank, contents: Sequence[str]) -> dict[Plan, dict[Plan, float]]:
    """Return the mean `worth` of each possible plan against each plan that a user may follow."""
    choices, closings = range(len(bank.choices)), range(max(1, len(bank.closings)))
    golds = list(product(choices, closings))
    # A styled answer may leave out the parts that the oracle does not know; a label cannot be left out.
    plans: list[Plan] = [*product((*choices, None), (*closings, None))] if bank.closings else [*golds]
    return {
        plan: {
            gold: fmean(worth(task, compose(bank, plan, text), compose(bank, gold, text)) for text in contents)
            for gold in golds
        }
        for plan in plans
    }


def _best(worths: Mapping[Plan, Mapping[Plan, float]], shares: Mapping[Plan, int]) -> Plan:
    """Return the plan with the highest expected `worth`; the first of ties."""
    return max(worths, key=lambda plan: sum(worths[plan][gold] * count for gold, count in shares.items()))
