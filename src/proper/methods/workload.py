"""Workload of a run, counted from its config and data before anything is trained: steps and tokens of every part.

Stages 1 and 2 are counted exactly, as they draw their rows, except that stage 1 may stop early. Stage 3 is counted as
if no user left early and every user got an adapter: an upper bound.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from proper.config import Config, GroupsConfig, PopulationConfig, UsersConfig
from proper.data.dataset import Dataset
from proper.data.stage_sample import stage_sample
from proper.evaluation.harness import HISTORY_SAMPLE
from proper.evaluation.runner import MAX_GATE_ITEMS
from proper.methods.spec import Method
from proper.run_folder import Stage, Tier
from proper.training.early_stopping import MEASUREMENTS, hold_out
from proper.training.jobs import PARTS, full_passes, held_out_items
from proper.training.trainer import count_updates


@dataclass(frozen=True)
class Work:
    """Work of one part of a run.

    Attributes:
        steps: optimizer steps; in stage 3, of all users together.
        tokens: tokens that are trained on, over all passes, without padding.
        forward: tokens of forward passes without a backward pass.
        decoded: steps in which a batch of rows gets its next tokens.
    """

    steps: int = 0
    tokens: int = 0
    forward: int = 0
    decoded: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.steps + other.steps,
            self.tokens + other.tokens,
            self.forward + other.forward,
            self.decoded + other.decoded,
        )

    def times(self, factor: int) -> Work:
        """Return the work of `factor` repetitions."""
        return Work(self.steps * factor, self.tokens * factor, self.forward * factor, self.decoded * factor)


@dataclass(frozen=True)
class Counts:
    """Counts of the data for the workload; lengths are in tokens and at most `compute.max_length`.

    Attributes:
        population, groups: rows, tokens, and tokens of the held-out rows of stages 1 and 2.
        histories: lengths of every target user's history rows, oldest first, `users.max_items` not applied.
        queries: lengths of the queries.
        answer: longest answer that is decoded, `task.max_new_tokens`; only for generation.
    """

    population: tuple[int, int, int]
    groups: tuple[int, int, int]
    histories: tuple[tuple[int, ...], ...]
    queries: tuple[int, ...]
    answer: int


def count(config: Config, dataset: Dataset) -> Counts:
    """Count the rows and tokens of a run's first seed.

    Raises:
        DataError: a stage has no rows to train on.
    """
    longest, seed = config.compute.max_length, config.evaluation.seeds[0]
    first = config.population
    sample = stage_sample(dataset, "population", config, seed)
    rows, held_out = hold_out(sample, first.held_out_share, longest)
    experts = stage_sample(dataset, "groups", config, seed)
    histories = tuple(
        tuple(min(row.tokens, longest) for row in dataset.history(user.id))
        for user in dataset.users("target")
        if user.history
    )
    return Counts(
        population=(rows.size, rows.tokens, sum(min(row.tokens, longest) for row in held_out)),
        groups=(experts.size, experts.tokens, 0),
        histories=histories,
        queries=tuple(min(query.tokens, longest) for query in dataset.queries()),
        answer=max(one.task.max_new_tokens for one in config.each_task.values()),
    )


def workload(config: Config, counts: Counts, methods: Sequence[Method]) -> dict[str, Work]:
    """Return the work of every stage and of the evaluation, over all seeds, by name.

    Methods with a training of their own count as the run's own stages, whatever their settings.
    """
    own = {
        Stage.POPULATION: _shared(config.population, counts.population, config.privacy.on),
        Stage.GROUPS: _shared(config.groups, counts.groups, config.privacy.on).times(
            2 if config.groups.experts == "auto" else 1
        ),
        Stage.USERS: users_work(config.users, counts.histories),
    }
    repeats = Counter(
        stage
        for method in methods
        if method.variant is not None
        for stage in method.stages
        if stage not in method.variant.inherits
    )
    trained = sum((own[stage].times(number) for stage, number in repeats.items()), Work())
    evaluated = answering(config, counts, methods) + trained
    seeds = len(config.evaluation.seeds)
    return {**{str(stage): work.times(seeds) for stage, work in own.items()}, "evaluate": evaluated.times(seeds)}


def _shared(config: PopulationConfig | GroupsConfig, counts: tuple[int, int, int], private: bool) -> Work:
    rows, tokens, held_out = counts
    # Steps over drawn users are not counted; on average, these pass over the rows as often.
    steps = 0 if private else count_updates(rows, config)
    measured = min(MEASUREMENTS, steps) * held_out
    return Work(steps, round(tokens * config.epochs), measured)


def users_work(config: UsersConfig, histories: Sequence[Sequence[int]]) -> Work:
    """Return the work of stage 3 on users with histories of these lengths."""
    total = Work()
    for history in histories:
        items = history if config.max_items is None else history[-config.max_items :]
        total += _fit(config, items)
        if config.tiers.select and len(items) > 1:
            cut = len(items) - held_out_items(len(items), config.tiers.validation)
            measurements = (PARTS + 1) * (len(config.scales) + 1)
            total += _fit(config, items[:cut]) + Work(forward=measurements * sum(items[cut:]))
    return total


def _fit(config: UsersConfig, items: Sequence[int]) -> Work:
    passes = full_passes(config, len(items))
    routed = 0 if config.router == "none" else config.router_epochs * sum(items)
    return Work(passes * ceil(len(items) / config.batch_size), passes * sum(items) + routed)


def answering(config: Config, counts: Counts, methods: Sequence[Method]) -> Work:
    """Return the work of all methods' answers, and of the measures on histories that the report shows."""
    models = [method for method in methods if method.stages or method.name == Tier.BASE]
    tokens = sum(counts.queries)
    answers = Work(forward=tokens)
    if not all(one.task.scored for one in config.each_task.values()):
        # The prompt, then the true answer's loss; the last batch is the longest, so each counts as full.
        batches = ceil(len(counts.queries) / config.compute.batch_size)
        answers = Work(forward=2 * tokens, decoded=batches * counts.answer)
    measured = Work()
    names = {method.name for method in methods}
    if {Tier.GROUPS, Tier.USERS} & names:
        measured += Work(forward=sum(sum(history[-MAX_GATE_ITEMS:]) for history in counts.histories))
    if Tier.USERS in names:
        measured += Work(forward=sum(sum(history[-HISTORY_SAMPLE:]) for history in counts.histories))
    return answers.times(len(models)) + measured


def cut_to(config: Config, counts: Counts) -> Counts:
    """Return the counts under lower budgets: tokens and rows of stages 1 and 2 in proportion, fewer queries."""
    queries = counts.queries[: config.split.max_queries]
    return replace(
        counts,
        population=_share(counts.population, config.population.max_tokens),
        groups=_share(counts.groups, config.groups.max_tokens),
        queries=queries,
    )


def _share(counts: tuple[int, int, int], limit: int | None) -> tuple[int, int, int]:
    rows, tokens, held_out = counts
    if limit is None or limit >= tokens + held_out:
        return counts
    part = limit / (tokens + held_out)
    return max(1, round(rows * part)), round(tokens * part), round(held_out * part)
