"""The config of a run folder: written when a run starts, and checked when the same call continues it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from proper.adapters.store_urls import forget_stores
from proper.config import Config, DataConfig, load_run_config, make_config, with_chat
from proper.data.chat import uses_chat_template
from proper.errors import ProperError, RunFolderError
from proper.files import private_folder, write_text
from proper.models.tokenizer import EMBEDDED, load_tokenizer
from proper.run_folder import TEMPORARY, RunFolder, Stage, is_run, require_run
from proper.run_lock import exclusive, is_first_process

logger = logging.getLogger(__name__)


def claim(folder: Path, config: Config) -> Config:
    """Write the config into a new run folder, or check that an existing one has the same; return it.

    The returned config has absolute paths, and states whether prompts use the chat template. The section `evaluation`
    may change between calls, except for the first seed; all other settings must stay the same.

    Raises:
        RunFolderError: the folder was made by another config, or it has files that are not a run's.
    """
    config = _absolute(config)
    path = RunFolder(folder).config
    started = run_config(folder) if path.exists() else None
    config = _settle_cut(_settle_chat(config, started), started)
    if path.exists():
        different = _difference(_absolute(run_config(folder)).model_dump(), config.model_dump())
        if different is not None:
            raise RunFolderError(f"{folder}: was made by another config: {different}; choose another folder")
    else:
        _require_free(folder)
    private_folder(folder)
    write_config(path, config)
    return config


def warn_of_newer_data(config: Config, prepared: Path) -> None:
    """Say so if a file of interactions has been written since the run read it into `prepared`."""
    for file in dict.fromkeys(Path(one.data.path) for one in config.each_task.values()):
        if file.is_file() and file.stat().st_mtime > prepared.stat().st_mtime:
            logger.warning(f"{file}: has changed since this run read it; the run keeps the rows that it has read")


def _absolute(config: Config) -> Config:
    """Return the config with absolute paths of what exists, so that a run can be used from any current folder."""

    def found(path: str | None) -> str | None:
        return str(Path(path).resolve()) if path is not None and Path(path).exists() else path

    def of_data(data: DataConfig) -> DataConfig:
        return data.model_copy(update={"path": found(data.path), "train_without": found(data.train_without)})

    name = config.backbone
    # Links are kept: that of a GGUF file in a cache has the name that tells its format.
    own = name != EMBEDDED and (os.path.isdir(name) or (os.path.isfile(name) and name.endswith(".gguf")))
    return config.with_data(of_data).model_copy(update={"backbone": os.path.abspath(name) if own else name})


def _settle_chat(config: Config, started: Config | None) -> Config:
    """Return the config with `data.chat` as `on` or `off`: as the run was started, else as the backbone has it."""
    if config.data.chat != "auto":
        return config
    if started is not None and started.data.chat != "auto":
        return with_chat(config, started.data.chat)
    tokenizer = load_tokenizer(config.backbone, trust_remote_code=config.trust_remote_code)
    return with_chat(config, "on" if uses_chat_template("auto", tokenizer, config.backbone) else "off")


def _settle_cut(config: Config, started: Config | None) -> Config:
    """Return the config with the settings that `compute.budget` lowered when the run was started."""
    if started is None or not started.compute.cut:
        return config
    raw, lowered = config.model_dump(), started.model_dump()
    for name, before in started.compute.cut.items():
        section, key = name.split(".")
        if raw[section][key] == before:
            raw[section][key] = lowered[section][key]
    raw["compute"]["cut"] = started.compute.cut
    return make_config(raw)


def _require_free(folder: Path) -> None:
    """Check that a folder can become a run folder: it does not exist, or has nothing but data, settings and a lock."""
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder}: is a file; choose another folder")
    run = RunFolder(folder)
    known = (run.demo_data, run.lock, run.storage, run.database)
    drafts = tuple(f".{path.name}." for path in (run.config, *known))  # a kill may leave unfinished files of these
    others = (each for each in (folder.iterdir() if folder.exists() else ()) if each not in known)
    if any(not (each.name.startswith(drafts) and fnmatchcase(each.name, TEMPORARY)) for each in others):
        raise RunFolderError(f"{folder}: is not empty and not a run folder; choose another folder")


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder, or of a folder that can become one.

    If the block fails before a new run has data, or refuses its input before the first stage is trained, the folder is
    as it was before, so that corrected input can use it.
    """
    if is_run(folder):
        with exclusive(folder):
            yield
        return
    _require_free(folder)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    before = set(folder.iterdir()) if folder not in made else set()
    with exclusive(folder):
        try:
            yield
        except BaseException as error:
            if is_first_process() and _is_refused(RunFolder(folder), error):
                _undo(folder, before)
                for each in made:
                    with suppress(OSError):  # it has other files now
                        each.rmdir()
            raise


def _is_refused(run: RunFolder, error: BaseException) -> bool:
    """Return whether a new run has failed with nothing worth keeping: no data, or data but input that is refused."""
    if run.is_trained(Stage.POPULATION) or run.checkpoint(Stage.POPULATION).exists():
        return False
    return not run.data.exists() or (isinstance(error, ProperError) and error.exit_code == 2)


def _undo(folder: Path, before: set[Path]) -> None:
    """Remove what a call wrote into a folder, and what it made in the stores that it recorded there."""
    run = RunFolder(folder)
    try:
        forget_stores(folder, before)
    except ProperError as error:  # the settings stay, for the next call
        logger.warning("%s: not removed: %s", folder, error)
    for path in (run.config, run.data, run.metrics_log, run.preflight, run.writers_lock, run.lock):
        if path not in before:
            path.unlink(missing_ok=True)


def write_config(path: Path, config: Config) -> None:
    """Write a config as YAML, unless the file has it already."""
    text = yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def run_config(folder: Path) -> Config:
    """Return the config that a run folder was made by.

    Raises:
        RunFolderError: the folder is not a run folder.
    """
    return load_run_config(require_run(folder).config)


def _difference(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> str | None:
    """Return the first setting that differs between the folder's config and the new one, as text."""
    if prefix == "tasks." and list(there) != list(here):
        return f"tasks are {', '.join(there) or 'none'} there and {', '.join(here) or 'none'} here"
    for key, value in here.items():
        name, other = f"{prefix}{key}", there[key]
        if name == "evaluation":
            if other["seeds"][0] != value["seeds"][0]:
                return f"evaluation.seeds begins with {other['seeds'][0]} there and {value['seeds'][0]} here"
        elif isinstance(value, dict) and isinstance(other, dict):
            inner = _difference(other, value, f"{name}.")
            if inner is not None:
                return inner
        elif other != value:
            return f"{name} is {_shown(other)} there and {_shown(value)} here"
    return None


def _shown(value: object) -> str:
    """Return a value as a config writes it."""
    return {None: "null", True: "true", False: "false"}[value] if isinstance(value, bool | None) else repr(value)
