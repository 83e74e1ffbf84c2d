"""Plans of stages 1 and 2: the settings of the training loop, and the privacy of both."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proper.config import Config, OptimizerConfig, PrivacyConfig
from proper.data.batching import RowEncoder
from proper.data.histories import Histories, SampledRows
from proper.data.stage_sample import SharedStage, stage_sample
from proper.models.backbone import Backbone
from proper.run_folder import RunFolder
from proper.training.checkpoint import Checkpoint
from proper.training.metrics_log import Log
from proper.training.optim import resolve_rate
from proper.training.privacy import UserSampling, sampling_of, with_noise
from proper.training.trainer import TrainingPlan

logger = logging.getLogger(__name__)

NOT_COVERED = (
    "privacy: not covered: users' own embeddings and adapters, the passes and scale that stage 3 chooses for all, the "
    "list of labels, the training log, results and reports, and models that methods of the evaluation train"
)
"""Line that a run logs about the parts that epsilon does not cover."""


@dataclass(frozen=True)
class Guarantee:
    """The privacy of a run's stages 1 and 2.

    Attributes:
        settings: `config.privacy` with the noise multiplier.
        epsilon: privacy loss of a user at `settings.delta`.
        population, groups: users and steps of the stages.
    """

    settings: PrivacyConfig
    epsilon: float
    population: UserSampling
    groups: UserSampling

    def line(self) -> str:
        """Return a line for a terminal."""
        own, stages = self.settings, (self.population, self.groups)
        steps = " and ".join(f"{stage.steps:,} steps on {stage.users:,} users" for stage in stages)
        return (
            f"privacy: epsilon {self.epsilon:.2f} at delta {own.delta:g} for a user, over stages 1 and 2: {steps}, "
            f"{own.users_per_step} users a step, noise {own.noise_multiplier:.3f} x clip {own.clip:g}"
        )

    def metadata(self) -> dict[str, Any]:
        """Return plain values for `stage.json` and `results.json`."""
        own = self.settings
        return {
            "unit": "user",
            "epsilon": round(self.epsilon, 4),
            "delta": own.delta,
            "noise_multiplier": own.noise_multiplier,
            "clip": own.clip,
            "users_per_step": own.users_per_step,
            "rows_per_user": own.rows_per_user,
            "population": {"users": self.population.users, "steps": self.population.steps},
            "groups": {"users": self.groups.users, "steps": self.groups.steps},
        }


def guarantee(config: Config, dataset: Histories) -> Guarantee | None:
    """Return the privacy of a run's stages 1 and 2; None without it.

    Raises:
        ConfigError: there are too few users, or no noise reaches the epsilon.
        DataError: a stage has no rows to train on.
        MissingExtraError: the accountant is not installed.
    """
    if not config.privacy.on:
        return None
    stages: dict[SharedStage, OptimizerConfig] = {"population": config.population, "groups": config.groups}
    first, second = (
        sampling_of(stage_sample(dataset, stage, config, 0), settings, config.privacy)
        for stage, settings in stages.items()
    )
    settings, epsilon = with_noise(config.privacy, (first, second))
    if settings.delta >= 1 / max(first.users, second.users):
        logger.warning(f"privacy.delta: {settings.delta:g} is not below 1 / {max(first.users, second.users)} users")
    return Guarantee(settings, epsilon, first, second)


def stage_plan(
    stage: SharedStage,
    config: Config,
    sample: SampledRows,
    backbone: Backbone,
    encoder: RowEncoder,
    folder: Path,
    seed: int,
    log: Log,
    privacy: PrivacyConfig | None = None,
) -> TrainingPlan:
    """Return the plan of stage 1 or 2: its hyperparameters, and its checkpoint in the run folder `folder`."""
    hyperparameters = config.population if stage == "population" else config.groups
    return TrainingPlan(
        config=hyperparameters,
        rate=resolve_rate(hyperparameters.learning_rate, stage, backbone.hidden_size),
        seed=seed,
        encoder=encoder,
        pad=backbone.pad_id,
        sample=sample,
        checkpoint=Checkpoint(RunFolder(folder).checkpoint(stage), config.compute.checkpoint_seconds),
        log=log,
        batch_tokens=backbone.batch_tokens,
        privacy=privacy,
    )
