"""Methods `groups+residual` and `users+residual`: stages 2 and 3 trained as a residual on the user prior.

    training    -log softmax_y(s(y | x, u) + log pi_u(y) - log pi(y))    pi_u from earlier answers (`training.residual`)
    answers     s(y | x, u) + log pi_u(y) - log pi(y)                    label: argmax; rating: median

Decay and smoothing of pi_u are those of the methods `prior` and `users+prior`; there is no weight to choose. Stage 1 is
the run's own. The trial of stage 3 measures its held-out items with this loss: a user gets an adapter if it improves on
prior and group model together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from proper.config import Config
from proper.data.batching import RowEncoder
from proper.data.dataset import Dataset
from proper.data.encoder import Encoder
from proper.data.prior import EarlierPriors
from proper.errors import ConfigError
from proper.evaluation.runner import MethodRun
from proper.methods.prior import log_probabilities, queries_of, score_as, user_priors, with_scores
from proper.methods.spec import DerivedRun, TrainedRun, TrainingWork
from proper.models.label_choice import takes_trees
from proper.run_folder import Stage, Tier
from proper.training.residual import ResidualEncoder, habit
from proper.training.stages import StageRunner


def train_residual(work: TrainingWork) -> None:
    """Train stages 2 and 3 with the loss of this form.

    Raises:
        ConfigError: the backbone takes no mask that labels behind one prompt need.
    """
    run = work.run

    def personal(encoder: Encoder) -> RowEncoder:
        return residual_encoder(encoder, run.dataset, run.config, run.seed)

    runner = StageRunner(run.config, run.dataset, run.folder, run.seed, work.log, personal)
    if not takes_trees(runner.backbone.model, run.config.compute.max_length):
        raise ConfigError("evaluation.methods: '+residual' needs a backbone that accepts a custom attention mask")
    runner.run(work.stages)


def residual_encoder(encoder: Encoder, dataset: Dataset, config: Config, seed: int) -> ResidualEncoder:
    """Return the encoder of training rows, with the priors of this data."""
    found = user_priors(dataset, config)
    numbers = found.population, found.decay, found.smoothing
    return ResidualEncoder(encoder, EarlierPriors(dataset.history, dataset.labels, config.task.kind, *numbers), seed)


RESIDUAL = DerivedRun("residual", train_residual, (Stage.POPULATION,))


def with_residual(tier: Tier) -> Callable[[TrainedRun], MethodRun]:
    """Answer with a tier of the stages that were trained in this form, and the user's prior."""

    def answer(trained: TrainedRun) -> MethodRun:
        run = score_as(tier, trained)
        asked = queries_of(run, trained.dataset)
        priors = user_priors(trained.dataset, trained.config)
        added = habit(np.stack([priors.shares(query.user) for query in asked]), priors.population)
        scores = np.asarray([found.label_scores or [] for found in run.predictions])
        both = log_probabilities((scores + added).tolist())
        return replace(run, predictions=with_scores(trained, run.predictions, asked, both))

    return answer
