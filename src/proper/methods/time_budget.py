"""Time of a run: an estimate per stage before it starts; budgets of tokens, items and queries that fit a given time.

The time budget (`compute.budget`) lowers settings in this order, each down to its minimum before the next:

    1. `population.max_tokens`, `groups.max_tokens` and `users.max_items`, by one factor, to what usually suffices
    2. `split.max_queries`, likewise
    3. the settings of 1 and `users.steps` (if set), by one factor, to the least that trains at all
    4. `split.max_queries`, to the least that is worth testing

One factor for all stages: a stage without enough tokens loses what the stages after it need. All samples are drawn
evenly over users.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from proper.config import Config, make_config, seconds_of
from proper.console import spoken_time
from proper.data.dataset import Dataset
from proper.methods.spec import Method
from proper.methods.speed import Speed, measure, parameters_of
from proper.methods.workload import Counts, Work, count, cut_to, workload
from proper.models.backbone import configured_backbone

ENOUGH_TOKENS, ENOUGH_ITEMS, ENOUGH_QUERIES = 100_000, 24, 480
"""Tokens of stages 1 and 2, items of a user and queries with which runs of docs/findings.md show gains (question 0)."""

MIN_TOKENS = 20_000
"""Minimum of `max_tokens` of stages 1 and 2: below, not even the format of the answers is learned."""

MIN_ITEMS, MIN_STEPS = 8, 10
"""Minimum of `users.max_items` and `users.steps`."""

MIN_QUERIES = 100
"""Minimum of `split.max_queries`."""

QUICK_TOKENS, QUICK_SECONDS = 50_000, 60.0
"""Runs with fewer trained tokens, or a shorter time by a rough estimate, start without measured steps."""

ROUGH_SPEED = 1e11
"""Floating-point operations per second of the rough estimate, 6 per parameter and token."""


@dataclass(frozen=True)
class TimeEstimate:
    """Work and seconds of every stage and of the evaluation, by name."""

    work: Mapping[str, Work]
    seconds: Mapping[str, float]

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return sum(self.seconds.values())

    def lines(self) -> list[str]:
        """Return a line per stage and one for all."""
        found = [_line(name, self.work[name], seconds) for name, seconds in self.seconds.items()]
        return [*found, f"time: together about {spoken_time(self.total)}"]


@dataclass(frozen=True)
class Fitted:
    """A config that fits its time budget.

    Attributes:
        lines: one line per setting that was lowered, and one if the time does not suffice for the minimum.
    """

    config: Config
    lines: list[str]


def estimate(config: Config, counts: Counts, methods: Sequence[Method], speed: Speed) -> TimeEstimate:
    """Return the estimated time of a run."""
    work = workload(config, counts, methods)
    return TimeEstimate(work, {name: speed.seconds(name, part) for name, part in work.items()})


def time_lines(config: Config, dataset: Dataset, methods: Sequence[Method]) -> list[str]:
    """Return the lines of `proper check --time`; takes seconds.

    Raises:
        DataError: a stage has no rows to train on.
    """
    counts = count(config, dataset)
    return _planned(config, counts, methods, measure(config, dataset))[1]


def plan(config: Config, dataset: Dataset, methods: Sequence[Method]) -> tuple[Config, list[str]]:
    """Return the config with lowered settings if it has a time budget, and the lines to show before a run starts.

    A run that is short by a rough estimate and has no budget gives no lines: measuring would take a large share of it.

    Raises:
        DataError: a stage has no rows to train on.
    """
    counts = count(config, dataset)
    # A resumed run keeps what was lowered when it was started.
    budget = None if config.compute.cut else config.compute.budget
    tokens = sum(work.tokens for work in workload(config, counts, methods).values())
    if budget is None and tokens < QUICK_TOKENS:
        return config, []
    backbone = configured_backbone(config)
    if budget is None and 6 * parameters_of(backbone) * tokens / ROUGH_SPEED < QUICK_SECONDS:
        return config, []
    return _planned(config, counts, methods, measure(config, dataset, backbone))


def _planned(config: Config, counts: Counts, methods: Sequence[Method], speed: Speed) -> tuple[Config, list[str]]:
    if config.compute.budget is None or config.compute.cut:
        return config, estimate(config, counts, methods, speed).lines()
    fitted = fit(config, counts, methods, speed)
    lines = estimate(fitted.config, cut_to(fitted.config, counts), methods, speed).lines()
    return fitted.config, [*fitted.lines, *lines]


def fit(config: Config, counts: Counts, methods: Sequence[Method], speed: Speed) -> Fitted:
    """Lower the settings of a config until its estimated time is within `compute.budget`."""
    assert config.compute.budget is not None
    limit = seconds_of(config.compute.budget)

    def total(changed: Config) -> float:
        return estimate(changed, cut_to(changed, counts), methods, speed).total

    lowered = config
    enough = partial(_less_training, tokens=ENOUGH_TOKENS, items=ENOUGH_ITEMS, steps=config.users.steps or MIN_STEPS)
    least = partial(_less_training, tokens=MIN_TOKENS, items=MIN_ITEMS, steps=MIN_STEPS)
    some, few = (partial(_fewer_queries, least=queries) for queries in (ENOUGH_QUERIES, MIN_QUERIES))
    for step in (enough, some, least, few):
        if total(lowered) > limit:
            lowered = _largest(partial(step, lowered, counts), total, limit)
    before, after = _settings(config), _settings(lowered)
    cut = {name: before[name] for name in before if after[name] != before[name]}
    lines = [
        f"compute.budget {config.compute.budget}: {name} is {after[name]:,} ({_was(before[name])})" for name in cut
    ]
    seconds = total(lowered)
    if seconds > limit:
        lines.append(f"compute.budget {config.compute.budget}: too short; the least takes about {spoken_time(seconds)}")
    return Fitted(_set(lowered, {"compute.cut": cut}), lines)


def _largest(lower: Callable[[float], Config], total: Callable[[Config], float], limit: float) -> Config:
    """Return the config of the largest share (0 to 1, to 1/256) within the time limit, else that of share 0."""
    low, high = 0, 256
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(lower(middle / 256)) <= limit else (low, middle)
    return lower(low / 256)


def _less_training(config: Config, counts: Counts, share: float, *, tokens: int, items: int, steps: int) -> Config:
    """Return the config with the budgets of all stages between the given ones (share 0) and its own (share 1)."""
    longest, own_steps = max(map(len, counts.histories), default=0), config.users.steps or 0
    now = {
        "population.max_tokens": (_at_most(sum(counts.population[1:]), config.population.max_tokens), tokens),
        "groups.max_tokens": (_at_most(sum(counts.groups[1:]), config.groups.max_tokens), tokens),
        "users.max_items": (_at_most(longest, config.users.max_items), items),
        "users.steps": (own_steps, steps),
    }
    return _set(config, {name: _between(low, high, share) for name, (high, low) in now.items() if high > low})


def _at_most(there: int, limit: int | None) -> int:
    return there if limit is None else min(there, limit)


def _fewer_queries(config: Config, counts: Counts, share: float, *, least: int) -> Config:
    there = _at_most(len(counts.queries), config.split.max_queries)
    return config if there <= least else _set(config, {"split.max_queries": _between(least, there, share)})


def _between(low: int, high: int, share: float) -> int:
    return round(low + (high - low) * share)


def _settings(config: Config) -> dict[str, int | None]:
    return {
        "population.max_tokens": config.population.max_tokens,
        "groups.max_tokens": config.groups.max_tokens,
        "users.steps": config.users.steps,
        "users.max_items": config.users.max_items,
        "split.max_queries": config.split.max_queries,
    }


def _set(config: Config, values: Mapping[str, object]) -> Config:
    raw = config.model_dump()
    for name, value in values.items():
        section, key = name.split(".")
        raw[section][key] = value
    return make_config(raw)


def _was(value: int | None) -> str:
    return "it was unlimited" if value is None else f"it was {value:,}"


def _line(name: str, work: Work, seconds: float) -> str:
    steps = f"{work.steps:,} steps, " if work.steps else ""
    return f"time: {name}: {steps}{work.tokens + work.forward:,} tokens, about {spoken_time(seconds)}"
