"""Training of a run's seeds on a cluster: the shared stages with Ray Train, then the users by actors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from proper.cluster.address import connected, devices
from proper.cluster.shared_stages import train_shared
from proper.cluster.user_adapters import ClusterFitting
from proper.run_folder import Stage
from proper.training.seeds import TrainSeed
from proper.training.stages import StageRunner


@contextmanager
def on_cluster(address: str, home: Path) -> Iterator[TrainSeed]:
    """Connect to a cluster, and train seeds on it within the block.

    Args:
        address: auto, local:N or ray://HOST:PORT.
        home: the run folder with config and data.

    Raises:
        InputError: the address is unknown, or no cluster answers there.
        MissingExtraError: Ray is not installed.
    """
    home = home.resolve()

    def train(runner: StageRunner, stages: Sequence[str]) -> None:
        folder = runner.folder.resolve()
        missing = [stage for stage in stages if stage != Stage.USERS and not runner.run_folder.is_trained(stage)]
        if missing:
            train_shared(home, folder, runner.seed, missing, devices(address))
        runner.run(stages, ClusterFitting(address, home, folder, runner.seed))

    with connected(address):
        yield train
