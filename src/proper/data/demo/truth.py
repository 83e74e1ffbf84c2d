"""Oracle answers of the demo data: the best answers given knowledge of the population, the group or the user.

"Knowledge" means the exact share of users who answer in each way, without noise. The best answer depends on the metric:
the likeliest label, the median rating, the text with the highest expected ROUGE-1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from statistics import fmean

from proper.data.demo.banks import Bank, sentence
from proper.data.demo.people import DemoUser
from proper.data.demo.settings import DemoTask

Plan = tuple[int | None, int | None]  # indices of an answer's choice and sign-off; None leaves it out

METRICS: Mapping[DemoTask, str] = {"classification": "accuracy", "rating": "mae", "style": "rouge1"}


@dataclass(frozen=True, slots=True)
class PlantedTruth:
    """Best plans per topic: for an unknown user, and for a member of each group."""

    population: tuple[Plan, ...]
    groups: Mapping[int, tuple[Plan, ...]]


def find_truth(
    task: DemoTask, bank: Bank, people: Sequence[DemoUser], contents: Sequence[Sequence[str]]
) -> PlantedTruth:
    """Compute the best plans for the population and for each group.

    Args:
        task: determines the metric of an answer, see `worth`.
        bank: the task's phrases.
        people: all users, with equal weight.
        contents: per topic a few contents of answers; a plan's value is its mean `worth` over them.
    """
    worths = [_worths(task, bank, some) for some in contents]
    groups = sorted({person.group for person in people})

    def best(knows: Sequence[DemoUser]) -> tuple[Plan, ...]:
        return tuple(_best(worth, Counter(own_plan(p, topic) for p in knows)) for topic, worth in enumerate(worths))

    return PlantedTruth(best(people), {group: best([p for p in people if p.group == group]) for group in groups})


def own_plan(person: DemoUser, topic: int) -> Plan:
    """Return a user's plan for a topic, without noise."""
    return person.habit[topic], person.closing


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
