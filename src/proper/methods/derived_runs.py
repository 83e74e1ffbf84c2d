"""Derived runs: create, train and cache the folder of a variant, with earlier stages taken over from the run.

    RUN/variants/NAME-HASH/       same layout as a run folder: config.yaml, population/, groups/, users/
    RUN/variants/data/NAME-HASH.sqlite

The hash covers all inputs: settings, data, seed and the training code. An existing folder is therefore up to date, a
killed call resumes, and other settings or code get another folder.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from proper.adapters.store import AdapterStore, UserRecord
from proper.config import Config, make_config
from proper.data.checks import require_no_leaks
from proper.data.dataset import Dataset
from proper.errors import ConfigError
from proper.evaluation.fingerprint import code_version, served_version
from proper.files import hash_value, make_folder, write_text
from proper.json_records import NUMBER, read_record
from proper.methods.spec import DerivedRun, Method, TrainedRun, TrainingWork
from proper.run_folder import RunFolder, Stage, Tier
from proper.training.metrics_log import MetricsLog
from proper.training.stages import join_processes

logger = logging.getLogger(__name__)

_TRAINERS = ("stage_methods", "derived_runs", "end_to_end", "per_user_lora", "poly", "poly_layers", "residual")
DERIVING_CODE = ("data", "methods/table.py", "methods/retrieved.py", "methods/prompt_states.py")
"""Parts of the package whose change makes derived data anew (`fingerprint.code_version`)."""
TRAINING_CODE = ("data", "layers", "models", "training", *(f"methods/{name}.py" for name in _TRAINERS))
"""Parts of the package whose change trains derived runs anew."""


def trained_run(method: Method, run: TrainedRun, home: Path, opened: dict[Path, Dataset]) -> TrainedRun:
    """Return the trained folder that `method` answers from; train missing stages.

    Args:
        method: the method.
        run: the run's own trained folder for one seed.
        home: the run folder, which contains the datasets of variants.
        opened: open datasets of variants by path; the caller closes them.

    Raises:
        RunFolderError: a stage of the run itself is missing.
        DataError: the variant's data leaks.
    """
    require_own_stages(method, run.folder)
    variant = method.variant
    if variant is None:
        return run
    trained = _variant_run(variant, run, home, opened)
    missing = [stage for stage in method.stages if not RunFolder(trained.folder).is_trained(stage)]
    if not missing:
        if trained.folder != run.folder:
            logger.info(f"evaluate: {method.name} (seed {run.seed}) reuses {trained.folder.relative_to(home)}")
        return trained
    _train(method, variant, run, trained)
    return trained


def require_own_stages(method: Method, folder: Path) -> None:
    """Raise RunFolderError unless a run has the stages that `method` takes from it."""
    for stage in method.variant.inherits if method.variant is not None else method.stages:
        RunFolder(folder).require_trained(stage)


def varied(config: Config, variant: DerivedRun) -> Config:
    """Return the run's config with the variant's settings."""
    raw = config.model_dump()
    for section, values in variant.settings.items():
        raw[section] = {**raw[section], **values}
    raw["groups"] = {**raw["groups"], "user_encoder": False}  # no user is enrolled in a variant
    # The preset's values are already in the sections, so applying it again would change nothing.
    return make_config(raw, f"method {variant.name}")


def _variant_run(variant: DerivedRun, run: TrainedRun, home: Path, opened: dict[Path, Dataset]) -> TrainedRun:
    config = varied(run.config, variant)
    dataset = run.dataset
    if variant.derive is not None:
        dataset = _derived(variant, config, run, home, opened)
    settings = config.model_dump(exclude={"evaluation"})
    code = code_version(*TRAINING_CODE)
    inherited = served_version(RunFolder(run.folder), run.dataset, variant.inherits)
    key = hash_value([variant.name, settings, list(variant.inherits), dataset.sha256, run.seed, code, inherited])
    return TrainedRun(config, dataset, RunFolder(run.folder).variant(f"{variant.name}-{key[:8]}").path, run.seed)


def _derived(variant: DerivedRun, config: Config, run: TrainedRun, home: Path, opened: dict[Path, Dataset]) -> Dataset:
    assert variant.derive is not None
    seed = run.seed if variant.seeded else None
    first, second = config.population, config.groups
    read = [first.train_on, first.max_tokens, first.sampling, second.train_on, second.max_tokens]
    made_of: list[object] = [variant.name, variant.derived_by, run.dataset.sha256, seed, config.backbone]
    made_of += [
        config.compute.max_length,
        config.data.chat,
        read,
        config.users.max_items,
        config.evaluation.seeds,
        config.retrieval.model_dump(),
    ]
    key = hash_value([*made_of, code_version(*DERIVING_CODE)])
    path = RunFolder(home).variant_data(f"{variant.name}-{key[:8]}")
    if path not in opened:
        if not path.exists():
            logger.info(f"evaluate: makes the data of {variant.name}")
            variant.derive(run.dataset, path, config, run.seed)
        opened[path] = Dataset.open(path)
        require_no_leaks(opened[path])
    return opened[path]


def _train(method: Method, variant: DerivedRun, run: TrainedRun, trained: TrainedRun) -> None:
    if join_processes(trained.config).num_processes > 1:
        raise ConfigError(
            f"evaluation.methods: '{method.name}' has to be trained first, in one process: proper evaluate {run.folder}"
        )
    logger.info(f"evaluate: trains {method.name} (seed {run.seed}) in {trained.folder}")
    text = yaml.safe_dump(trained.config.model_dump(), sort_keys=False, allow_unicode=True)
    write_text(RunFolder(trained.folder).config, text)
    for stage in variant.inherits:
        _inherit(stage, run.folder, trained.folder)
    log = MetricsLog(RunFolder(trained.folder).metrics_log)
    try:
        variant.train(TrainingWork(trained, _in_order([*variant.inherits, *method.stages]), log))
    finally:
        log.close()


def _in_order(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    return tuple(stage for stage in Stage if stage in stages)


def _inherit(stage: Stage, source: Path, target: Path) -> None:
    """Hard-link (else copy) a stage's files from the run; sharing is safe, since files are only replaced whole."""
    run, marker = RunFolder(target), RunFolder(source).marker(stage).name
    if run.is_trained(stage):
        return
    if stage == Stage.USERS:
        raise ValueError("the last stage is never taken over: nothing would be left to train")
    if stage == Stage.GROUPS:
        _inherit_embeddings(RunFolder(source).users.path, run.users.path)
    names = sorted(path.name for path in (source / stage).iterdir() if path.is_file() and path.name != marker)
    make_folder(target / stage)
    for name in [*names, marker]:
        (target / stage / name).unlink(missing_ok=True)
        linked = False
        with suppress(OSError):  # A file system without hard links: copied below.
            os.link(source / stage / name, target / stage / name)
            linked = True
        if not linked:
            shutil.copyfile(source / stage / name, target / stage / name)


def _inherit_embeddings(source: Path, target: Path) -> None:
    """Create a store with the stage 2 embedding of every user of the run, on the groups tier."""
    theirs, ours = AdapterStore(source), AdapterStore(target)
    try:
        heads = ((user, theirs.head(user)) for user, _ in list(theirs.users()))
        ours.put(UserRecord(user, Tier.GROUPS, head.embedding) for user, head in heads if head is not None)
    finally:
        theirs.close()
        ours.close()


def seconds_of(trained: TrainedRun, stages: Sequence[Stage]) -> float:
    """Return the training time of these stages in seconds, stages taken over from the run included."""
    markers = [RunFolder(trained.folder).marker(stage) for stage in stages]
    return sum(float(read_record(marker, seconds=NUMBER)["seconds"]) for marker in markers if marker.exists())
