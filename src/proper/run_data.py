"""The prepared data of a run: made from the config once, opened again, and fitted to the run's time budget."""

from __future__ import annotations

import logging
from pathlib import Path

from proper.adapters.store import DEFAULT_TENANT
from proper.adapters.tombstones import Tombstones
from proper.config import Config
from proper.console import progress
from proper.data.checks import require_query_of_each_task
from proper.data.database import get_meta
from proper.data.dataset import Dataset, left_out_users, prepare
from proper.data.label_tree import require_distinct
from proper.data.summary import truncation, untimed
from proper.errors import DataError, ProperError
from proper.interactions.personal_files import remove_rows
from proper.methods.table import known_methods, require_targets, table_methods
from proper.methods.time_budget import plan
from proper.models.tokenizer import configured_encoder
from proper.run_config import warn_of_newer_data, write_config
from proper.run_folder import RunFolder, Stage

logger = logging.getLogger(__name__)


def open_data(config: Config, folder: Path, skip_bad_rows: bool) -> Dataset:
    """Open the run's prepared data; prepare it if it does not exist.

    Raises:
        ConfigError: the task has not what a method of `evaluation.methods` needs.
        DataError: the data cannot be used.
    """
    path = RunFolder(folder).data
    if not path.exists():
        data = _prepared(config, RunFolder(folder), skip_bad_rows)
    else:
        warn_of_newer_data(config, path)
        if not RunFolder(folder).is_trained(Stage.POPULATION):
            remove_rows(path, left_out_users(config.data.train_without))
        data = Dataset.open(path)
    try:
        require_targets(known_methods(config.evaluation.methods, config), data)
    except ProperError:
        data.close()
        raise
    return data


def _prepared(config: Config, run: RunFolder, skip_bad_rows: bool) -> Dataset:
    """Prepare the data, without users who were deleted from the run."""
    encoder = configured_encoder(config)
    with progress("read interactions", None) as advance:
        deleted = Tombstones(run.users.path).of_tenant(DEFAULT_TENANT)
        data = prepare(
            config, run.data, encoder.count, skip_bad_rows=skip_bad_rows, progress=advance, is_left_out=deleted
        )
    try:
        for name, labels in (get_meta(data.connection, "tasks") or {"": data.labels}).items():
            require_distinct(labels, encoder.answer, f"tasks.{name}.task" if name else "task")
        require_query_of_each_task(data)
    except DataError:
        data.close()
        raise
    return data


def fit_to_time(config: Config, dataset: Dataset, folder: Path, skip_bad_rows: bool) -> tuple[Config, Dataset]:
    """Show what a new run cuts and how long it takes, and fit it to its time budget; return the config and the data."""
    run = RunFolder(folder)
    if run.is_trained(Stage.POPULATION) or run.checkpoint(Stage.POPULATION).exists():
        return config, dataset
    fitting, lines = plan(config, dataset, table_methods(config.evaluation.methods, config))
    for line in filter(None, [*config.unescaped, untimed(dataset), truncation(dataset), *lines]):
        logger.info(line)
    if fitting.split != config.split:
        # Before the config is written: a killed run prepares the data again, by whichever config it finds.
        dataset.close()
        run.data.unlink()
    write_config(run.config, fitting)
    return fitting, dataset if fitting.split == config.split else open_data(fitting, folder, skip_bad_rows)
