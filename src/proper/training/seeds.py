"""Trains the stages of every seed of a run, each in its own folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from proper.config import Config
from proper.data.dataset import Dataset
from proper.run_config import write_config
from proper.run_folder import RunFolder, Stage
from proper.training.metrics_log import MetricsLog, no_log
from proper.training.preflight import check_once
from proper.training.stages import StageRunner

TrainSeed = Callable[[StageRunner, Sequence[str]], None]
"""Function that trains the given stages of one seed."""


def train_here(runner: StageRunner, stages: Sequence[str]) -> None:
    """Train a seed's stages in this process."""
    runner.run(stages)


def seed_folder(folder: Path, config: Config, seed: int) -> Path:
    """Return the folder of a seed's stages: the run folder itself for the first seed, `seeds/N` below it for others."""
    return folder if seed == config.evaluation.seeds[0] else RunFolder(folder).seed(seed).path


def train_seeds(
    config: Config,
    dataset: Dataset,
    folder: Path,
    stages: Sequence[str],
    *,
    is_main: bool,
    train: TrainSeed = train_here,
) -> None:
    """Train the given stages of all seeds of a run.

    Args:
        config: the run's settings.
        dataset: its data.
        folder: the run folder.
        stages: any of `Stage`; with none, nothing is done.
        is_main: whether this process writes the run folder, among those of `accelerate launch`.
        train: trains one seed.
    """
    if not stages:
        return
    log = MetricsLog(RunFolder(folder).metrics_log) if is_main else None
    try:
        for seed in config.evaluation.seeds:
            place = seed_folder(folder, config, seed)
            if is_main and place != folder:
                write_config(RunFolder(place).config, config)
            runner = StageRunner(config, dataset, place, seed, log or no_log)
            if not RunFolder(place).is_trained(Stage.POPULATION):
                check_once(runner.backbone, config, folder, write=is_main)
            train(runner, stages)
    finally:
        if log is not None:
            log.close()
