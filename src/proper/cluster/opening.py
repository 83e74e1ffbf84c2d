"""Opens a run folder in a process of the cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from proper.console import quiet_libraries
from proper.data.dataset import Dataset
from proper.run_config import run_config
from proper.run_folder import RunFolder
from proper.training.metrics_log import MetricsLog, no_log
from proper.training.stages import StageRunner


@contextmanager
def open_runner(home: Path, folder: Path, seed: int, *, logging: bool) -> Iterator[StageRunner]:
    """Open the data of a run and a runner of one seed's stages.

    Args:
        home: the run folder with config and data.
        folder: the seed's folder.
        seed: the seed.
        logging: whether the runner writes to the run's `metrics.jsonl`.
    """
    quiet_libraries()
    log = MetricsLog(RunFolder(home).metrics_log) if logging else None
    try:
        with Dataset.open(RunFolder(home).data) as dataset:
            yield StageRunner(run_config(home), dataset, folder, seed, log or no_log)
    finally:
        if log is not None:
            log.close()
