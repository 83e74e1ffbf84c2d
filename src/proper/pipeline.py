"""Pipeline of a run: prepare data, train the stages population, groups and users, evaluate, report.

Every step writes its result to the run folder and is skipped if the result exists, so the same call continues where an
earlier one stopped. The steps themselves are implemented in other modules.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from proper.adapters.store import DEFAULT_TENANT
from proper.adapters.tombstones import Tombstones
from proper.config import Config, load_config, load_run_config, make_config, with_chat
from proper.console import progress, quiet_libraries
from proper.data.chat import uses_chat_template
from proper.data.dataset import Dataset, prepare
from proper.data.demo import DemoSettings, demo_config, write_demo
from proper.data.demo.users import DemoTask
from proper.data.summary import DataSummary, summarize
from proper.errors import ConfigError, RunFolderError, did_you_mean
from proper.evaluation.harness import Harness
from proper.evaluation.power import Power, expected_power
from proper.evaluation.side_by_side import compare_runs
from proper.files import private_folder, write_text
from proper.interactions.deletion import working
from proper.interactions.personal_files import remove_deleted
from proper.methods.evaluate import evaluating
from proper.methods.table import known_methods
from proper.models.backbone import configured_backbone
from proper.models.targets import find_targets
from proper.models.tokenizer import configured_encoder, load_tokenizer
from proper.reports.compare import write_comparison
from proper.reports.html import write_report
from proper.reports.methods import write_methods_csv
from proper.reports.user_page import write_user_pages
from proper.run_folder import LADDER, RunFolder, Stage, is_run, require_run
from proper.run_lock import exclusive
from proper.training.preflight import check_once, preflight
from proper.training.stages import StageRunner, join_processes
from proper.training.trainer import MetricsLog

STAGES = (*Stage, "evaluate", "report")

# Settings of the demo: few epochs, larger learning rates and batches, so that it ends soon. The learning rate of user
# embeddings is higher than by default, since each gets fewer than a hundred updates in all.
DEMO_TRAINING: dict[str, dict[str, Any]] = {
    "population": {"epochs": 1, "max_tokens": 90_000, "dropout": 0},
    "groups": {
        "epochs": 3,
        "batch_size": 48,
        "learning_rate": 4e-3,
        "user_embedding": 16,
        "embedding_learning_rate": 3e-1,
        "dropout": 0,
    },
    "users": {"epochs": 3, "batch_size": 8, "learning_rate": 5e-3},
}
DEMO_TARGETS = 50


def run(
    config: Config | str | Path,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    stages: Sequence[str] = STAGES,
    skip_bad_rows: bool = False,
) -> Path:
    """Run the requested stages in their order in the run folder `out`, and return its path.

    Args:
        config: settings, or the path of a YAML file.
        out: the run folder; a run that was started with the same settings continues where it stopped.
        overrides: "section.key=value", for a config that is a path.
        stages: any of `STAGES`.
        skip_bad_rows: leave out rows that cannot be used instead of raising DataError.

    Raises:
        ConfigError: a setting or a stage is unknown or impossible.
        DataError: the data cannot be used.
        RunFolderError: the folder was made by another config, another process works in it, or an earlier stage is
            missing.
        NonFiniteLossError: training diverged.
    """
    quiet_libraries()
    settings = config if isinstance(config, Config) else load_config(Path(config), overrides)
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise ConfigError(f"--stages: no stage '{unknown[0]}'; {did_you_mean(unknown[0], STAGES)}")
    known_methods(settings.evaluation.methods, settings)
    folder = Path(out)
    with _alone(folder):
        _run(settings, folder, stages, skip_bad_rows)
    return folder


def _run(settings: Config, folder: Path, stages: Sequence[str], skip_bad_rows: bool) -> None:
    processes = join_processes(settings)
    with processes.main_process_first():
        settings = _claim(folder, settings)
        with working(folder):
            data = _data(settings, folder, skip_bad_rows)
    with data as dataset, working(folder):
        _train(settings, dataset, folder, [stage for stage in Stage if stage in stages], processes.is_main_process)
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
    _run_config(Path(folder))
    with exclusive(Path(folder)):
        return _evaluate(Path(folder), methods)


def _evaluate(folder: Path, methods: Sequence[str] | None) -> dict[str, Any]:
    config = _run_config(folder)
    chosen = known_methods(config.evaluation.methods if methods is None else methods, config)
    folders = {seed: seed_folder(folder, config, seed) for seed in config.evaluation.seeds}
    with (
        working(folder),
        Dataset.open(RunFolder(folder).data) as dataset,
        evaluating(config, dataset, folders) as judge,
    ):
        results = Harness(config, dataset, folders).evaluate(judge.contenders(chosen))
        write_methods_csv(folder)
    return results


def report(folder: str | Path) -> Path:
    """Write `report.html` from a run's files and return its path.

    Raises:
        RunFolderError: the run has not been evaluated, or another process works in its folder.
    """
    _run_config(Path(folder))
    with exclusive(Path(folder)), working(Path(folder)):
        return write_report(Path(folder))


def report_comparison(folder: str | Path, other: str | Path) -> list[Path]:
    """Compare a run with another of the same data; write a page and a CSV into the first and return their paths.

    Raises:
        DataError: the runs have different tasks or data.
        RunFolderError: one of the runs has not been evaluated.
    """
    folder, other = Path(folder), Path(other)
    _run_config(folder)
    with exclusive(folder), working(folder):
        return write_comparison(folder, other, compare_runs(folder, other))


def report_users(folder: str | Path, users: Sequence[str]) -> list[Path]:
    """Write a page for each of these users into a run folder, all or none of them, and return the paths.

    Raises:
        InputError: a user is not in the run.
        RunFolderError: the run has not been evaluated.
    """
    _run_config(Path(folder))
    with exclusive(Path(folder)), working(Path(folder)):
        return write_user_pages(Path(folder), users)


@dataclass(frozen=True)
class Checked:
    """Summary of the data that a config trains on, and the smallest difference that its queries can resolve."""

    summary: DataSummary
    power: Power | None

    def lines(self) -> list[str]:
        """Return lines for a terminal."""
        return [*self.summary.lines(), *([self.power.line()] if self.power is not None else [])]


def check(config: Config, *, skip_bad_rows: bool = False) -> Checked:
    """Summarize the data that a config trains on, with its expected statistical power; trains and keeps nothing.

    Raises:
        DataError: the data cannot be used.
    """
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder, _data(config, Path(folder), skip_bad_rows) as dataset:
        return Checked(summarize(dataset), expected_power(dataset, config.task.kind))


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


def demo(out: str | Path, *, task: DemoTask = "classification", seed: int = 0, people: int = 300) -> Path:
    """Generate data of simulated users and run all stages on it; return the run folder.

    Raises:
        InputError: a setting is impossible.
        RunFolderError: the folder has a run with other settings.
    """
    folder = Path(out)
    settings = DemoSettings(task=task, users=people, seed=seed)
    run = RunFolder(folder)
    path = run.demo_rows.resolve()
    raw = {**demo_config(path, settings), **DEMO_TRAINING}
    raw["split"]["target_users"] = min(DEMO_TARGETS, people)
    raw["evaluation"] = {"methods": list(map(str, LADDER)), "seeds": [seed]}
    config = make_config(raw, "demo")
    quiet_libraries()
    with _alone(folder):
        _claim(folder, config)
        if not run.data.exists():
            write_demo(run.demo_data, settings)
            remove_deleted(run)
        _run(config, folder, STAGES, skip_bad_rows=False)
    return folder


def seed_folder(folder: Path, config: Config, seed: int) -> Path:
    """Return the folder of a seed's stages: the run folder itself for the first seed, `seeds/N` below it for others."""
    return folder if seed == config.evaluation.seeds[0] else RunFolder(folder).seed(seed).path


def _train(config: Config, dataset: Dataset, folder: Path, stages: Sequence[str], is_main: bool) -> None:
    if not stages:
        return
    log = MetricsLog(RunFolder(folder).metrics_log) if is_main else None
    try:
        for seed in config.evaluation.seeds:
            place = seed_folder(folder, config, seed)
            if is_main and place != folder:
                _write_config(RunFolder(place).config, config)
            runner = StageRunner(config, dataset, place, seed, log or _unsaid)
            if not RunFolder(place).is_trained(Stage.POPULATION):
                check_once(runner.backbone, config, folder, write=is_main)
            runner.run(stages)
    finally:
        if log is not None:
            log.close()


def _unsaid(facts: dict[str, Any]) -> None:
    """Log nothing; used by all processes but the main one."""


def _data(config: Config, folder: Path, skip_bad_rows: bool) -> Dataset:
    """Open the run's prepared data; prepare it if it does not exist."""
    path = RunFolder(folder).data
    if path.exists():
        return Dataset.open(path)
    encoder = configured_encoder(config)
    with progress("read interactions", None) as advance:
        deleted = Tombstones(RunFolder(folder).users.path).of_tenant(DEFAULT_TENANT)
        dataset = prepare(
            config, path, encoder.count, skip_bad_rows=skip_bad_rows, progress=advance, is_left_out=deleted
        )
    return dataset


def _claim(folder: Path, config: Config) -> Config:
    """Write the config into a new run folder, or check that an existing one has the same; return it.

    The returned config has an absolute data path, and says whether prompts use the chat template. The section
    `evaluation` may change between calls, except for the first seed; all other settings must stay the same.
    """
    data = Path(config.data.path)
    if data.exists():
        config = config.model_copy(update={"data": config.data.model_copy(update={"path": str(data.resolve())})})
    path = RunFolder(folder).config
    config = _settle_chat(config, _run_config(folder) if path.exists() else None)
    if path.exists():
        different = _first_difference(_run_config(folder).model_dump(), config.model_dump())
        if different is not None:
            raise RunFolderError(f"{folder}: was made by another config: {different}; choose another folder")
    else:
        _require_free(folder)
    private_folder(folder)
    _write_config(path, config)
    return config


def _settle_chat(config: Config, started: Config | None) -> Config:
    """Return the config with `data.chat` as `on` or `off`: as the run was started, else as the backbone has it."""
    if config.data.chat != "auto":
        return config
    if started is not None and started.data.chat != "auto":
        return with_chat(config, started.data.chat)
    tokenizer = load_tokenizer(config.backbone, trust_remote_code=config.trust_remote_code)
    return with_chat(config, "on" if uses_chat_template("auto", tokenizer, config.backbone) else "off")


def _require_free(folder: Path) -> None:
    """Check that a folder can become a run folder: it does not exist, or has nothing but data and a lock."""
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder}: is a file; choose another folder")
    run = RunFolder(folder)
    if folder.exists() and any(child not in (run.demo_data, run.lock) for child in folder.iterdir()):
        raise RunFolderError(f"{folder}: is not empty and not a run folder; choose another folder")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder, or of a folder that can become one."""
    if not is_run(folder):
        _require_free(folder)
    with exclusive(folder):
        yield


def _write_config(path: Path, config: Config) -> None:
    text = yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def _run_config(folder: Path) -> Config:
    return load_run_config(require_run(folder).config)


def _first_difference(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> str | None:
    for key, value in here.items():
        name, held = f"{prefix}{key}", there[key]
        if name == "evaluation":
            if held["seeds"][0] != value["seeds"][0]:
                return f"evaluation.seeds begins with {held['seeds'][0]} there and {value['seeds'][0]} here"
        elif isinstance(value, dict) and isinstance(held, dict):
            inner = _first_difference(held, value, f"{name}.")
            if inner is not None:
                return inner
        elif held != value:
            return f"{name} is {held!r} there and {value!r} here"
    return None
