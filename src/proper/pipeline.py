"""Pipeline of a run: prepare data, train the stages population, groups and users, evaluate, report.

Every step writes its result to the run folder and is skipped if the result exists, so the same call continues where an
earlier one stopped. The steps themselves are implemented in other modules.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from proper.adapters.store_urls import record_store
from proper.config import Config, load_config, make_config
from proper.console import quiet_libraries
from proper.data.dataset import Dataset
from proper.data.demo import DemoSettings, demo_run, write_demo
from proper.data.demo.users import DemoTask
from proper.data.stage_sample import SHARED_STAGES, stage_sample
from proper.data.summary import summarize
from proper.errors import ConfigError, did_you_mean
from proper.evaluation.harness import Harness
from proper.evaluation.power import expected_power
from proper.evaluation.side_by_side import compare_runs
from proper.interactions.deletion import working
from proper.interactions.personal_files import remove_deleted
from proper.methods.evaluate import evaluating
from proper.methods.table import known_methods, require_targets, table_methods
from proper.methods.time_budget import time_lines
from proper.models.backbone import configured_backbone
from proper.models.checkpoints import settled
from proper.models.targets import find_targets
from proper.reports.compare import write_comparison
from proper.reports.html import write_report
from proper.reports.methods import write_methods_csv
from proper.reports.user_page import write_user_pages
from proper.run_config import claim, hold, run_config
from proper.run_data import fit_to_time, open_data
from proper.run_folder import RunFolder, Stage, require_run
from proper.run_lock import exclusive
from proper.training.plans import guarantee
from proper.training.preflight import preflight
from proper.training.seeds import TrainSeed, seed_folder, train_here, train_seeds
from proper.training.stages import join_processes

STAGES = (*Stage, "evaluate", "report")


def run(
    config: Config | str | Path,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    stages: Sequence[str] = STAGES,
    skip_bad_rows: bool = False,
    cluster: str | None = None,
    stores: Sequence[str] = (),
) -> Path:
    """Run the requested stages in their order in the run folder `out`, and return its path.

    Args:
        config: settings, or the path of a YAML file.
        out: the run folder; a run that was started with the same settings continues where it stopped.
        overrides: "section.key=value", for a config that is a path.
        stages: any of `STAGES`.
        skip_bad_rows: leave out rows that cannot be used instead of raising DataError.
        cluster: address of the Ray cluster that trains (auto, local:N or ray://HOST:PORT); None: this process trains.
        stores: where a new run keeps its adapters (s3://...) and state (postgresql://...), if not in its folder.

    Raises:
        ConfigError: a setting or a stage is unknown or impossible.
        InputError: no cluster answers at the address, or the run keeps its adapters elsewhere.
        DataError: the data cannot be used.
        RunFolderError: the folder was made by another config, another process uses it, or an earlier stage is missing.
        NonFiniteLossError: training diverged.
    """
    quiet_libraries()
    settings = config if isinstance(config, Config) else load_config(Path(config), overrides)
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise ConfigError(f"--stages: no stage '{unknown[0]}'; {did_you_mean(unknown[0], STAGES)}")
    known_methods(settings.evaluation.methods, settings)
    folder = Path(out)
    with hold(folder):
        for url in stores:
            record_store(folder, url)
        _run(settings, folder, stages, skip_bad_rows, cluster=cluster)
    return folder


def _run(
    settings: Config,
    folder: Path,
    stages: Sequence[str],
    skip_bad_rows: bool,
    estimate: bool = True,
    cluster: str | None = None,
) -> None:
    processes = join_processes(settings)
    with processes.main_process_first():
        settings = claim(folder, settings)
        with working(folder):
            data = open_data(settings, folder, skip_bad_rows)
            if estimate and processes.is_main_process and set(stages) & set(Stage):
                settings, data = fit_to_time(settings, data, folder, skip_bad_rows)
    training = [stage for stage in Stage if stage in stages]
    with data as dataset, working(folder), _trainer(cluster if training else None, folder) as train:
        train_seeds(settings, dataset, folder, training, is_main=processes.is_main_process, train=train)
    # All processes of `accelerate launch` train stages 1 and 2; only the main process does the rest.
    if not processes.is_main_process:
        return
    if "evaluate" in stages:
        _evaluate(folder, None)
    if "report" in stages:
        with working(folder):
            write_report(folder)


def evaluate(folder: str | Path, methods: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluate methods on a run's held-out queries; write `results.json` and return its content.

    Trains the models that methods need beyond the run. The same numbers are written to `methods.csv`.

    Raises:
        ConfigError: a method is unknown.
        DataError: a query leaks into training.
        RunFolderError: the folder is not a run, another process works in it, or one of its own stages is missing.
    """
    quiet_libraries()
    require_run(Path(folder))
    with exclusive(Path(folder)):
        return _evaluate(Path(folder), methods)


def _evaluate(folder: Path, methods: Sequence[str] | None) -> dict[str, Any]:
    config = settled(run_config(folder), RunFolder(folder).experts)
    chosen = table_methods(config.evaluation.methods if methods is None else methods, config)
    folders = {seed: seed_folder(folder, config, seed) for seed in config.evaluation.seeds}
    with (
        working(folder),
        Dataset.open(RunFolder(folder).data) as dataset,
        evaluating(config, dataset, folders) as evaluator,
    ):
        require_targets(chosen, dataset)
        results = Harness(config, dataset, folders).evaluate(evaluator.specs(chosen))
        write_methods_csv(folder)
    return results


def report(folder: str | Path) -> Path:
    """Write `report.html` from a run's files and return its path.

    Raises:
        RunFolderError: the run has not been evaluated, or another process works in its folder.
    """
    require_run(Path(folder))
    with exclusive(Path(folder)), working(Path(folder)):
        return write_report(Path(folder))


def report_comparison(folder: str | Path, other: str | Path) -> list[Path]:
    """Compare a run with another of the same data; write a page and a CSV into the first and return their paths.

    Raises:
        DataError: the runs have different tasks or data.
        RunFolderError: one of the runs has not been evaluated.
    """
    folder, other = Path(folder), Path(other)
    require_run(folder)
    with exclusive(folder), working(folder):
        return write_comparison(folder, other, compare_runs(folder, other))


def report_users(folder: str | Path, users: Sequence[str]) -> list[Path]:
    """Write a page for each of these users into a run folder, all or none of them, and return the paths.

    Raises:
        InputError: a user is not in the run.
        RunFolderError: the run has not been evaluated.
    """
    require_run(Path(folder))
    with exclusive(Path(folder)), working(Path(folder)):
        return write_user_pages(Path(folder), users)


def check(config: Config, *, skip_bad_rows: bool = False) -> list[str]:
    """Summarize the data that a config trains on, one line each; trains and keeps nothing.

    The last lines are the smallest difference that the queries can resolve, unless there are several tasks, and the
    privacy guarantee, if the config asks for one.

    Raises:
        ConfigError: the task has not what a method of `evaluation.methods` needs.
        DataError: the data cannot be used, or a stage has no rows to train on.
    """
    quiet_libraries()
    known_methods(config.evaluation.methods, config)
    with tempfile.TemporaryDirectory() as folder, open_data(config, Path(folder), skip_bad_rows) as dataset:
        for stage in SHARED_STAGES:
            stage_sample(dataset, stage, config, 0)
        power = None if config.tasks else expected_power(dataset, config.task.kind)
        found = (power, guarantee(config, dataset))
        notes = [f"{'note':<10}{sentence}" for sentence in config.unescaped]
        return [*summarize(dataset).lines(), *notes, *(each.line() for each in found if each is not None)]


def check_time(config: Config, *, skip_bad_rows: bool = False) -> list[str]:
    """Estimate the time of a run from a few measured steps; return a line per stage, and what a time budget lowers.

    Raises:
        DataError: the data cannot be used, or a stage has no rows to train on.
    """
    quiet_libraries()
    methods = table_methods(config.evaluation.methods, config)
    with tempfile.TemporaryDirectory() as folder, open_data(config, Path(folder), skip_bad_rows) as dataset:
        return time_lines(config, dataset, methods)


def check_backbone(config: Config) -> str:
    """Try all stages and decoding on the backbone with two short rows; return a line that names the adapted modules.

    Raises:
        ConfigError: the backbone is not supported; the message says why.
    """
    quiet_libraries()
    backbone = configured_backbone(config)
    preflight(backbone, config)
    stages = ((Stage.POPULATION, config.population.target_modules), ("groups and users", config.groups.target_modules))
    found = {stage: find_targets(backbone.model, wanted) for stage, wanted in stages}
    parts = [f"{stage}: {', '.join(sorted({n.rpartition('.')[2] for n in names}))}" for stage, names in found.items()]
    return f"backbone {config.backbone} ({type(backbone.model).__name__}) is supported; adapted are {'; '.join(parts)}"


def demo(out: str | Path, *, task: DemoTask = "classification", seed: int = 0, users: int = 300) -> Path:
    """Generate data of simulated users and run all stages on it; return the run folder.

    Raises:
        InputError: a setting is impossible.
        RunFolderError: the folder has a run with other settings.
    """
    folder, settings = Path(out), DemoSettings(task=task, users=users, seed=seed)
    run = RunFolder(folder)
    config = make_config(demo_run(run.demo_rows.resolve(), settings), "demo")
    quiet_libraries()
    with hold(folder):
        claim(folder, config)
        if not run.data.exists():
            write_demo(run.demo_data, settings)
            remove_deleted(run)
        _run(config, folder, STAGES, skip_bad_rows=False, estimate=False)
    return folder


def _trainer(cluster: str | None, folder: Path) -> AbstractContextManager[TrainSeed]:
    """Return the context in which a seed's stages are trained: on a cluster or in this process."""
    if cluster is None:
        return nullcontext(train_here)
    from proper.cluster.training import on_cluster

    return on_cluster(cluster, folder)
