"""Method `head+prior`: a linear head on frozen features, and the user's prior.

    log p(y | x, u) = W_y z(x) + b_y + c log pi_u(y) - log Z

z(x) are the hidden states of the prompt after the last layer: their mean over the tokens and that of the last token,
standardized. W, b and c minimize the mean -log p plus l / 2 |W|^2 over the rows that the three stages train on; the
prior of a training row uses the user's earlier items. l is chosen by -log p on the target users' held-out items, in
a fit without them. `head+prior` trains no adapter: it is a baseline for the benefit of adapters.

Shapes: N rows, F features, L labels.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from proper.console import progress
from proper.data.dataset import Dataset
from proper.data.histories import TextExample
from proper.data.prior import Floats, UserPriors, earlier_priors, label_numbers, user_prior
from proper.data.stage_sample import SHARED_STAGES, stage_sample
from proper.evaluation.runner import MethodRun, prediction_of
from proper.inference.loading import load
from proper.inference.model import PersonalizedModel
from proper.methods.prior import log_priors, user_priors, with_scores
from proper.methods.prompt_states import mean_state, prompt_states
from proper.methods.spec import Method, TrainedRun
from proper.run_folder import Stage, Tier

PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""Values of l, from the strongest; each fit starts at the one before."""

MAX_ROWS = 20_000
"""Rows that are fitted: their features are in memory."""


@dataclass(frozen=True)
class HeadRows:
    """Rows to fit a head on or to answer.

    Attributes:
        features: z(x), `(N, F)`.
        habits: log pi_u, `(N, L)`.
        labels: index of each row's label, `(N,)`.
    """

    features: Float[Tensor, "N F"]
    habits: Float[Tensor, "N L"]
    labels: Int[Tensor, "N"]


class LinearHead:
    """W, b and c, with the scale of the features."""

    def __init__(self, rows: HeadRows) -> None:
        size, labels = rows.features.shape[1], rows.habits.shape[1]
        self.mean, self.scale = rows.features.mean(0), rows.features.std(0, correction=0).clamp(min=1e-6)
        self.weight, self.bias, self.habit = torch.zeros(labels, size), torch.zeros(labels), torch.ones(())

    def scores(self, rows: HeadRows) -> Float[Tensor, "N L"]:
        """Return log p up to a constant per row."""
        return self._scaled(rows) @ self.weight.T + self.bias + self.habit * rows.habits

    def fit(self, rows: HeadRows, penalty: float, steps: int = 200) -> None:
        """Minimize the loss from the current parameters, by L-BFGS."""
        parameters = [self.weight, self.bias, self.habit]
        for parameter in parameters:
            parameter.requires_grad_(True)
        features = self._scaled(rows)
        solver = torch.optim.LBFGS(
            parameters, max_iter=steps, tolerance_grad=1e-5, tolerance_change=1e-9, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            solver.zero_grad()
            scores = features @ self.weight.T + self.bias + self.habit * rows.habits
            value = nn.functional.cross_entropy(scores, rows.labels) + penalty / 2 * self.weight.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        solver.step(loss)  # type: ignore[no-untyped-call]
        for parameter in parameters:
            parameter.requires_grad_(False)

    def _scaled(self, rows: HeadRows) -> Float[Tensor, "N F"]:
        return (rows.features - self.mean) / self.scale


def head_with_prior(trained: TrainedRun) -> MethodRun:
    """Fit the head on the rows of the three stages, and answer every query."""
    dataset, priors = trained.dataset, user_priors(trained.dataset, trained.config)
    rows, queries = training_rows(trained), list(dataset.queries())
    model = load(trained.folder, Tier.POPULATION)
    try:
        features = pooled_states(model, [row.prompt for row in rows], dataset.labels, "head+prior, histories")
        started = time.perf_counter()
        asked = pooled_states(model, [query.prompt for query in queries], dataset.labels, "head+prior, queries")
        seconds = time.perf_counter() - started
    finally:
        model.close()
    number = label_numbers(dataset.labels, trained.config.task.kind)
    head = fit_head(HeadData(rows, features, dataset, priors, number))
    unknown = torch.zeros(len(queries), dtype=torch.long)
    logs = head.scores(HeadRows(asked, log_priors(priors, queries).float(), unknown)).double().log_softmax(1)
    histories = {user.id: user.history for user in dataset.users("target")}
    blank = [prediction_of(query, "", Tier.POPULATION, histories.get(query.user, 0)) for query in queries]
    found = with_scores(trained, blank, queries, logs)
    kept = [replace(row, label_scores=own) for row, own in zip(found, logs.round(decimals=4).tolist(), strict=True)]
    return MethodRun(kept, max(seconds, 1e-9), sum(query.tokens for query in queries))


HEAD = Method("head+prior", head_with_prior, (Stage.POPULATION,), keeps="history", needs="labels")


def training_rows(trained: TrainedRun) -> list[TextExample]:
    """List the rows that the three stages train on, each once; at most `MAX_ROWS`, those of target users first."""
    dataset, config = trained.dataset, trained.config
    targets = (dataset.history(user.id, config.users.max_items) for user in dataset.users("target"))
    samples = (stage_sample(dataset, stage, config, trained.seed) for stage in reversed(SHARED_STAGES))
    every = itertools.chain(itertools.chain.from_iterable(targets), *(sample.rows(0) for sample in samples))
    found: dict[int, TextExample] = {}
    for row in every:
        if len(found) == MAX_ROWS:
            break
        found.setdefault(row.id, row)
    return list(found.values())


def pooled_states(
    model: PersonalizedModel, prompts: Sequence[str], labels: Sequence[str], title: str
) -> Float[Tensor, "N F"]:
    """Return z(x): the mean and the last of a prompt's hidden states after the last layer, fp32, on the CPU."""
    room = max(len(model.encoder.answer(label)) for label in labels)
    encoded = [model.encoder.prompt(prompt, room=room) for prompt in prompts]
    found: dict[int, Tensor] = {}
    for chunk, states, mask in prompt_states(model.model.backbone, encoded, model.config.compute.batch_size, title):
        pooled = torch.cat([mean_state(states, mask), states[:, -1]], dim=1)
        found |= dict(zip(chunk, pooled.cpu(), strict=True))
    return torch.stack([found[at] for at in range(len(prompts))])


@dataclass(frozen=True)
class HeadData:
    """Rows to fit a head on, and what their priors are computed from.

    Attributes:
        features: z(x) of the rows, `(N, F)`.
        dataset: has the users' histories.
        number: function from a label to its index; negative for a text that is no label.
    """

    rows: Sequence[TextExample]
    features: Float[Tensor, "N F"]
    dataset: Dataset
    priors: UserPriors
    number: Callable[[str], int]

    def habits(self, *, hold_out: bool) -> tuple[dict[int, Floats], set[int]]:
        """Return log pi_u by the id of a row, from the user's items before it, and the ids of held-out rows.

        With `hold_out`, no prior knows a held-out answer; without, no row is held out.
        """
        priors = self.priors
        population = priors.population_before if hold_out else priors.population
        found: dict[int, Floats] = {}
        newest: set[int] = set()
        for user in dict.fromkeys(row.user for row in self.rows):
            known = [(row.id, at) for row in self.dataset.history(user) if (at := self.number(row.target)) >= 0]
            cut = len(known) - (priors.held.get(user, 0) if hold_out else 0)
            answers = np.asarray([at for _, at in known[:cut]], dtype=np.int64)
            own = earlier_priors(answers, population, priors.decay, priors.smoothing)
            found |= {key: np.log(shares) for (key, _), shares in zip(known[:cut], own, strict=True)}
            after = np.log(user_prior(answers, population, priors.decay, priors.smoothing))
            found |= {key: after for key, _ in known[cut:]}
            newest |= {key for key, _ in known[cut:]}
        return found, newest

    def select(self, habits: Mapping[int, Floats]) -> HeadRows:
        """Return the rows that have a prior in `habits`; rows without a label have none."""
        chosen = [at for at, row in enumerate(self.rows) if row.id in habits]
        width = len(next(iter(habits.values()))) if habits else 0
        stacked = np.stack([habits[self.rows[at].id] for at in chosen]) if chosen else np.zeros((0, width))
        labels = torch.tensor([self.number(self.rows[at].target) for at in chosen], dtype=torch.long)
        return HeadRows(self.features[chosen], torch.from_numpy(stacked).float(), labels)


def fit_head(data: HeadData) -> LinearHead:
    """Choose l on the held-out rows in a fit on the others, then fit all rows; rows without a label do not count."""
    before, held = data.habits(hold_out=True)
    older = data.select({key: habit for key, habit in before.items() if key not in held})
    newest = data.select({key: habit for key, habit in before.items() if key in held})
    penalty = PENALTIES[len(PENALTIES) // 2]
    if len(newest.labels) and len(older.labels):
        head, losses = LinearHead(older), []
        with progress("head+prior: fits", len(PENALTIES)) as advance:
            for each in PENALTIES:
                head.fit(older, each)
                losses.append(float(nn.functional.cross_entropy(head.scores(newest), newest.labels)))
                advance()
        penalty = PENALTIES[losses.index(min(losses))]
    every = data.select(data.habits(hold_out=False)[0])
    head = LinearHead(every)
    head.fit(every, penalty)
    return head
