"""Training on a real Ray cluster on this machine: the same adapters for any number of workers, killed or not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from proper import pipeline
from proper.adapters.store import AdapterStore
from proper.cluster.address import connected
from proper.cluster.opening import open_runner
from proper.cluster.user_adapters import ClusterFitting
from proper.config import Config, make_config
from proper.errors import InputError, ProperError
from proper.files import read_json
from proper.models.checkpoints import load_tensors
from proper.run_folder import RunFolder

# Ray warns of its own deprecated settings.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

TRAINING = ("population", "groups", "users")
WORDS = ("red", "green", "blue", "small", "large", "old", "new", "quiet", "loud", "round")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, backbone_folder: Path) -> Config:
    """The config of a run with ten target users on the tiny backbone.

    Its shared stages draw and couple nothing by process. A user is trained alone: tests/training/test_alone.py shows
    that it makes no difference, with a model whose gradients are not nearly zero, of which AdamW makes a whole step.
    """
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for user in range(10):
            for at in range(5 + user % 4):
                text = " ".join(WORDS[(user * 3 + at * k) % 10] for k in range(1, 3 + (at * 5 + user) % 7))
                row = {"user_id": f"u{user}", "timestamp": at, "input": f"{text} is", "output": WORDS[(user + at) % 3]}
                file.write(json.dumps(row) + "\n")
    return make_config(
        {
            "data": {"path": str(path), "prompt": "{input}"},
            "backbone": str(backbone_folder),
            "compute": {"dtype": "fp32", "max_length": 64, "device": "cpu", "checkpoint_seconds": 0.1},
            "split": {"target_users": 10, "min_history": 1, "shared_items": "allow"},
            "population": {"epochs": 1, "dropout": 0},
            "groups": {"epochs": 2, "user_embedding": 16, "dropout": 0, "constraint": {"kind": "none"}},
            "users": {"steps": 4, "slots": 1, "storage": "fp32", "tiers": {"select": False}},
        }
    )


@pytest.fixture(scope="module")
def shared(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with stages 1 and 2, trained by this process."""
    return pipeline.run(config, tmp_path_factory.mktemp("shared") / "run", stages=TRAINING[:2])


@pytest.fixture(scope="module")
def alone(config: Config, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with all stages, trained by this process on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return pipeline.run(config, copied(shared, tmp_path_factory.mktemp("alone")), stages=TRAINING)
    finally:
        torch.set_num_threads(threads)


def copied(run: Path, folder: Path) -> Path:
    """A copy of a run folder."""
    return Path(shutil.copytree(run, folder / "run"))


def adapters(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every user's embedding and adapter."""
    store = AdapterStore(RunFolder(folder).users.path)
    found = {}
    for user, _, _, _ in store.metadata():
        record = store.get(user)
        assert record is not None and record.adapter is not None
        found[user] = {"embedding": record.embedding, **record.adapter}
    store.close()
    return found


def assert_same(one: Path, other: Path, bound: float = 1e-4) -> None:
    """Compare all users, each tensor relative to its norm."""
    first, second = adapters(one), adapters(other)
    assert first.keys() == second.keys() and len(first) == 10
    for user, tensors in first.items():
        for name, tensor in tensors.items():
            assert float((second[user][name] - tensor).norm()) <= bound * float(tensor.norm()), (user, name)


# One worker has all cores, and sums of another number of threads differ.
@pytest.mark.parametrize(("workers", "bound"), [(1, 1e-2), (2, 1e-4), (4, 1e-4)])
def test_a_user_s_adapter_does_not_depend_on_the_number_of_workers(
    config: Config, shared: Path, alone: Path, workers: int, bound: float, tmp_path: Path
) -> None:
    run = pipeline.run(config, copied(shared, tmp_path), stages=TRAINING, cluster=f"local:{workers}")
    assert_same(alone, run, bound)
    assert read_json(RunFolder(run).marker("users"))["users"] == 10
    assert not RunFolder(run).users.work.exists()


def test_two_processes_train_the_shared_stages_as_one_does(config: Config, shared: Path, tmp_path: Path) -> None:
    run = pipeline.run(config, tmp_path / "run", stages=TRAINING[:2], cluster="local:2")
    # Sums in another order differ by 1e-7, of which AdamW makes a part of a step where a gradient is nearly zero.
    rate = 3 * config.groups.embedding_learning_rate
    for user, tensors in embeddings(shared).items():
        torch.testing.assert_close(embeddings(run)[user], tensors, rtol=0, atol=1e-4)
    one, two = (load_tensors(RunFolder(each).experts)[0] for each in (shared, run))
    for name, tensor in one.items():
        assert float((two[name] - tensor).abs().max()) < rate, name
        assert float((two[name] - tensor).norm()) < 1e-2 * float(tensor.norm()) + 1e-6, name


def embeddings(folder: Path) -> dict[str, torch.Tensor]:
    """Every user's embedding."""
    store = AdapterStore(RunFolder(folder).users.path)
    found = {user: head.embedding for user, head, _ in store.heads()}
    store.close()
    return found


def started(config: Config, run: Path) -> subprocess.Popen[bytes]:
    """`proper run --cluster local:2` in a process group of its own."""
    path = run.parent / "config.yaml"
    path.write_text(json.dumps(config.model_dump()), encoding="utf-8")
    command = [sys.executable, "-m", "proper", "run", str(path), "--out", str(run), "--cluster", "local:2"]
    return subprocess.Popen([*command, "--stages", ",".join(TRAINING)], start_new_session=True, stderr=subprocess.PIPE)


def wait_for(found: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    """Wait until `found()` is true; the process must not end before."""
    while not found():
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        time.sleep(0.02)


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    """The process ids of the actors that fit users."""
    listed = subprocess.run(["pgrep", "-f", "ray::UserWorker"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in listed.stdout.split() if int(pid) != process.pid]


def test_a_worker_and_then_the_driver_are_killed(config: Config, shared: Path, alone: Path, tmp_path: Path) -> None:
    run = copied(shared, tmp_path)
    pieces = RunFolder(run).users.work / "final-pieces"

    first = started(config, run)
    wait_for(lambda: any(pieces.glob("*/store/users.sqlite")), first)
    os.kill(workers_of(first)[0], signal.SIGKILL)
    wait_for(lambda: any(pieces.glob("*/final-fit.json")), first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()

    second = started(config, run)
    assert second.wait() == 0, second.stderr and second.stderr.read().decode()
    assert_same(alone, run)
    assert not RunFolder(run).users.work.exists()


def test_workers_that_cannot_open_the_run_end_it_in_one_line(config: Config, shared: Path, tmp_path: Path) -> None:
    run, elsewhere = copied(shared, tmp_path), tmp_path / "elsewhere"
    with (
        connected("local:1"),
        open_runner(run, run, 0, logging=False) as runner,
        pytest.raises(ProperError, match=r"^3 workers died while they opened the run: [^\n]*elsewhere[^\n]*$"),
    ):
        runner.run(TRAINING, ClusterFitting("local:1", elsewhere, elsewhere, 0))


def test_no_cluster_answers(config: Config, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--cluster ray://127\.0\.0\.1:1: no Ray cluster answers"):
        pipeline.run(config, tmp_path / "run", stages=TRAINING, cluster="ray://127.0.0.1:1")
