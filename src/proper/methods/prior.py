"""Methods with the user prior: `prior` alone, and mixtures with a stage's label probabilities (method: user prior).

    p(y | x, u) = w p_model(y | x, u) + (1 - w) pi_u(y)         label: argmax; rating: median

Decay and smoothing of pi_u, and w, are chosen on the target users' held-out history items: the newest items of the rows
that stage 3 trains on, as many as its trial holds out. w has the best main metric there (accuracy, or MAE of the
median), and of those that tie the lowest mean -log p: by -log p alone, an ill-calibrated model gets no weight although
its best label is right more often than the prior's.

The run's adapters are trained on the held-out items, so their answers to these would be too good and w too large.
`users+prior` therefore trains stage 3 once more on the histories without them, with the run's settings, and scores the
items with these adapters. The group model is the run's own, which has seen the items, here as in the trials of stage 3.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from proper.config import Config, TaskConfig
from proper.data.dataset import Dataset
from proper.data.derived.copies import ask_held_out
from proper.data.histories import TextExample
from proper.data.prior import UserPriors
from proper.evaluation.metrics import Prediction
from proper.evaluation.runner import MethodRun, label_losses, likely_labels, prediction_of
from proper.inference.loading import load
from proper.inference.score import score
from proper.methods.derived_runs import trained_run
from proper.methods.evaluate import answered
from proper.methods.spec import DerivedRun, Method, PerUser, TrainedRun
from proper.methods.stage_methods import as_itself, train_stages
from proper.run_folder import RunFolder, Stage, Tier
from proper.training.jobs import held_out_items

Floats = NDArray[np.float64]

WEIGHTS = np.linspace(0, 1, 41)
"""Values of w that are tried."""

MAX_HELD = 256
"""Held-out items that are scored to choose w: one number needs no more, and scoring costs as much as a query each."""


def user_priors(dataset: Dataset, config: Config) -> UserPriors:
    """Return the priors of a run's target users, with decay and smoothing chosen on their held-out items."""

    def held_out(items: int) -> int:
        seen = items if config.users.max_items is None else min(items, config.users.max_items)
        return max(1, held_out_items(seen, config.users.tiers.validation))

    return UserPriors.of(dataset, config.task.kind, held_out)


def prior(trained: TrainedRun) -> MethodRun:
    """Answer every query with the user's prior alone."""
    started, dataset = time.perf_counter(), trained.dataset
    priors, queries = user_priors(dataset, trained.config), list(dataset.queries())
    histories = {user.id: user.history for user in dataset.users("target")}
    blank = [prediction_of(query, "", "trivial", histories.get(query.user, 0)) for query in queries]
    habits = log_priors(priors, queries)
    return MethodRun(with_scores(trained, blank, queries, habits), max(time.perf_counter() - started, 1e-9), 0)


def with_prior(tier: Tier) -> Callable[[TrainedRun], MethodRun]:
    """Answer with the mixture of a tier's label probabilities and the user's prior."""

    def answer(trained: TrainedRun) -> MethodRun:
        run = score_as(tier, trained)
        priors = user_priors(trained.dataset, trained.config)
        scored = held_out(trained, priors) if tier == Tier.GROUPS else held_out_by_adapters(trained, priors)
        weight = choose_weight(scored, trained.config.task, trained.dataset.labels)
        asked = queries_of(run, trained.dataset)
        model = log_probabilities([found.label_scores or [] for found in run.predictions])
        mixed = log_mixture(model, log_priors(priors, asked), weight)
        return replace(run, predictions=with_scores(trained, run.predictions, asked, mixed))

    return answer


def queries_of(run: MethodRun, dataset: Dataset) -> list[TextExample]:
    """Return the query of each prediction."""
    queries = {query.id: query for query in dataset.queries()}
    return [queries[row.id] for row in run.predictions]


def score_as(tier: Tier, trained: TrainedRun) -> MethodRun:
    """Return a tier's own predictions with the labels' scores."""
    stages = tuple(Stage)[: list(Stage).index(Stage(tier)) + 1]
    keeps: PerUser = "embedding" if tier == Tier.GROUPS else "adapter"
    return _scored(Method(tier, as_itself(tier), stages, keeps=keeps), trained)


def _scored(method: Method, trained: TrainedRun) -> MethodRun:
    """Return a method's predictions with the labels' scores: those of its own row if the task scores labels."""
    if trained.config.task.scored:
        return answered(method, trained, RunFolder(trained.folder), label_scores=True)
    task = trained.config.task.model_copy(update={"decode": "score"})
    return method.answer(replace(trained, config=trained.config.model_copy(update={"task": task})))


@dataclass(frozen=True)
class HeldOut:
    """Held-out items with a model's label probabilities and the users' priors, `(N, L)` each."""

    rows: Sequence[TextExample]
    model: Floats
    habit: Floats


def held_out(trained: TrainedRun, priors: UserPriors) -> HeldOut:
    """Score at most `MAX_HELD` held-out items with the group model, in rounds of one per user, the newest first."""
    labels, rows = trained.dataset.labels, _held_out(trained.dataset, priors)
    if not rows:
        return HeldOut((), np.zeros((0, len(labels))), np.zeros((0, len(labels))))
    model = load(trained.folder, Tier.GROUPS)
    try:
        scores = score(model, [row.prompt for row in rows], [row.user for row in rows], labels)
    finally:
        model.close()
    return HeldOut(rows, probabilities(scores.tolist()), np.stack([priors.shares_before(row.user) for row in rows]))


def held_out_by_adapters(trained: TrainedRun, priors: UserPriors) -> HeldOut:
    """Score at most `MAX_HELD` held-out items with adapters that are trained without any held-out item."""

    def derive(source: Dataset, path: Path, config: Config, seed: int) -> None:
        ask_held_out(source, path, priors.held, MAX_HELD)

    users = trained.config.users
    # The name is a part of the data's key, and the held-out items follow from these settings.
    name = f"held-out-{users.max_items or 'all'}-{users.tiers.validation:g}"
    variant = DerivedRun(name, train_stages, (Stage.POPULATION, Stage.GROUPS), derive=derive)
    method = Method(str(Tier.USERS), as_itself(Tier.USERS), tuple(Stage), variant, keeps="adapter")
    opened: dict[Path, Dataset] = {}
    try:
        trial = trained_run(method, trained, RunFolder(trained.folder).home.path, opened)
        found = {row.id: row for row in _scored(method, trial).predictions}
        known = set(trained.dataset.labels)
        rows = [row for row in trial.dataset.queries() if row.target in known]
    finally:
        for dataset in opened.values():
            dataset.close()
    if not rows:
        return HeldOut((), np.zeros((0, len(known))), np.zeros((0, len(known))))
    model = probabilities([found[row.id].label_scores or [] for row in rows])
    return HeldOut(rows, model, np.stack([priors.shares_before(row.user) for row in rows]))


def choose_weight(found: HeldOut, task: TaskConfig, labels: Sequence[str]) -> float:
    """Return the w of the grid with the best main metric on the items, then the lowest -log p; 0.5 without items."""

    def errors(weight: float) -> tuple[float, float]:
        scores = torch.from_numpy(np.log((weight * found.model + (1 - weight) * found.habit).clip(min=1e-30)))
        answers = likely_labels(scores, task, labels)
        pairs = [(answer, row.target) for answer, row in zip(answers, found.rows, strict=True)]
        wrong = [abs(float(a) - float(b)) if task.kind == "rating" else float(a != b) for a, b in pairs]
        losses = [loss for loss in label_losses(scores, found.rows, labels) if loss is not None]
        return round(fmean(wrong), 9), fmean(losses)

    return min(map(float, WEIGHTS), key=errors) if found.rows else 0.5


def probabilities(scores: Sequence[Sequence[float]]) -> Floats:
    """Return the softmax over the labels of log-likelihoods in nats, `(N, L)`."""
    return np.asarray(log_probabilities(scores).exp().numpy())


def log_probabilities(scores: Sequence[Sequence[float]]) -> Float[Tensor, "N L"]:
    """Return the logarithms of `probabilities`, which are finite where a probability is below the smallest number."""
    return torch.tensor(scores, dtype=torch.float64).log_softmax(1)


def log_priors(priors: UserPriors, queries: Sequence[TextExample]) -> Float[Tensor, "N L"]:
    """Return log pi_u of the queries' users."""
    return torch.from_numpy(np.log(np.stack([priors.shares(query.user) for query in queries])))


def log_mixture(one: Float[Tensor, "N L"], other: Float[Tensor, "N L"], weight: float) -> Float[Tensor, "N L"]:
    """Return log(w p_one + (1 - w) p_other) from log-probabilities."""
    first, second = torch.tensor([weight, 1 - weight], dtype=torch.float64).log()
    return torch.logaddexp(one + first, other + second)


def _held_out(dataset: Dataset, priors: UserPriors) -> list[TextExample]:
    """List held-out items with a known label, in rounds of one item per user."""
    known = set(dataset.labels)
    newest: Mapping[str, list[TextExample]] = {
        user: [row for row in dataset.history(user, held)[::-1] if row.target in known]
        for user, held in priors.held.items()
        if held
    }
    rounds = range(max((len(rows) for rows in newest.values()), default=0))
    found = [rows[at] for at in rounds for rows in newest.values() if at < len(rows)]
    return found[:MAX_HELD]


def with_scores(
    trained: TrainedRun, blank: Sequence[Prediction], queries: Sequence[TextExample], scores: Float[Tensor, "N L"]
) -> list[Prediction]:
    """Return predictions with the answers that these log-probabilities of the labels give.

    They have no loss per token: a mixture of label probabilities says nothing of an answer's tokens.
    """
    labels = trained.dataset.labels
    answers = likely_labels(scores, trained.config.task, labels)
    losses = label_losses(scores, queries, labels)
    return [
        replace(row, prediction=answer, loss=None, label_loss=loss, label_scores=None)
        for row, answer, loss in zip(blank, answers, losses, strict=True)
    ]
