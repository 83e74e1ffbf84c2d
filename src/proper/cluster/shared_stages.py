"""Stages 1 and 2 on a cluster with Ray Train: every process takes its rows of each batch, and gradients are summed.

The processes run `StageRunner` as `accelerate launch` would run it; the first one writes the run folder. A process that
dies ends the attempt, and the next attempt goes on from the stage's checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proper.cluster.address import Devices
from proper.errors import ProperError

ATTEMPTS = 5
"""Number of restarts after a process died, before the run ends with an error."""


def train_shared(home: Path, folder: Path, seed: int, stages: Sequence[str], devices: Devices) -> None:
    """Train stages 1 and 2 of one seed; stages that are done are skipped.

    Args:
        home: the run folder with config and data.
        folder: the seed's folder.
        seed: the seed.
        stages: "population", "groups" or both.
        devices: the processes.

    Raises:
        ProperError: training failed, or its processes died too often.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    settings = {"home": str(home), "folder": str(folder), "seed": seed, "stages": list(stages)}
    each = {"CPU": devices.cpus, **({"GPU": devices.gpus} if devices.gpus else {})}
    scaling = ScalingConfig(num_workers=devices.count, use_gpu=bool(devices.gpus), resources_per_worker=each)
    with tempfile.TemporaryDirectory(prefix="proper-ray-") as scratch:
        kept = RunConfig(name="shared", storage_path=scratch, failure_config=FailureConfig(max_failures=ATTEMPTS))
        trainer = TorchTrainer(
            _train_here,
            train_loop_config={**settings, "threads": devices.threads},
            scaling_config=scaling,
            run_config=kept,
        )
        try:
            trainer.fit()
        except Exception as error:
            raise ProperError(
                f"{folder}: stages {', '.join(stages)} failed on the cluster: {last_line(error)}"
            ) from error


def _train_here(settings: dict[str, Any]) -> None:
    """Train in one process of the cluster."""
    import torch
    from ray.train import get_context

    from proper.cluster.opening import open_runner

    torch.set_num_threads(settings["threads"])
    is_first = get_context().get_world_rank() == 0
    with open_runner(Path(settings["home"]), Path(settings["folder"]), settings["seed"], logging=is_first) as runner:
        runner.run(settings["stages"])


def last_line(error: BaseException) -> str:
    """Return the last line of the innermost error, which is the one that says what was wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
