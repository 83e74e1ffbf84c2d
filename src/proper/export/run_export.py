"""Export of users and the backbone from a run folder, and import of users into one.

    native      one user's own state, for another run of the same backbone and groups      exact
    peft        one plain LoRA per module, for any server, on the merged backbone           gates averaged
    backbone    the backbone with stage 1 merged, as transformers saves it                  exact

Every export is a folder that is written atomically. The origin of an adapter (`run_origin`) is computed here from the
run's files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

from proper.adapters.records import MADE
from proper.adapters.store import DEFAULT_TENANT, AdapterStore, UserRecord
from proper.config import Config, load_run_config
from proper.data.dataset import Dataset
from proper.data.histories import TextExample
from proper.errors import InputError, StoreError
from proper.export.fold import fold, folded_rank
from proper.export.peft_format import adapter_config, served_rank, to_peft, uniform
from proper.export.user_archive import DESCRIPTION, read_user, write_user
from proper.files import atomic_folder, hash_file, write_json
from proper.inference.loading import load
from proper.inference.model import PersonalizedModel
from proper.interactions.log import InteractionLog, UserIdError, require_id
from proper.interactions.user_rows import logged_rows, run_rows
from proper.json_records import read_record
from proper.layers.layout import Layout
from proper.models.backbone import Backbone
from proper.models.checkpoints import bases_digest, load_tensors, tensor_of
from proper.models.targets import user_targets
from proper.run_folder import PEFT_CONFIG, PEFT_WEIGHTS, RunFolder, Stage, require_run

Format = Literal["native", "peft"]

TEXTS = "interactions.jsonl"
"""File of a native export with all texts that the run has of the user, for the user to read; imports ignore it."""


@dataclass(frozen=True)
class Imported:
    """Result of an import.

    Attributes:
        record: the imported user.
        same_router: whether this run's LoRA-aware router is that of the export; the user's gates depend on it.
    """

    record: UserRecord
    same_router: bool


def export_user(folder: Path, user: str, out: Path, *, form: Format = "native", force: bool = False) -> None:
    """Export one user of a run to the folder `out`.

    Raises:
        InputError: the store does not know the user, `out` exists (without `force`), or in the peft format the user has
            no history or the backbone is quantized.
        RunFolderError: a stage that the export needs is missing.
        StoreError: the user's adapter is damaged.
    """
    require_free(out, force)
    origin = run_origin(folder)
    with _store(folder) as store:
        record = _existing(store, user)
    if form == "native":
        with atomic_folder(out) as place:
            write_user(place, record, origin | _router(folder))
            _write_texts(place / TEXTS, folder, user)
        return
    model = load(folder)
    try:
        require_dense(folder, model.model.backbone)
        with Dataset.open(run_data(folder)) as dataset, atomic_folder(out) as place:
            write_peft(place, model, dataset.history(user, model.config.users.max_items), user, {"origin": origin})
    finally:
        model.close()


def import_user(
    folder: Path, source: Path, *, name: str | None = None, force: bool = False, deleted: bool = False
) -> Imported:
    """Import a natively exported user into a run, under another name if `name` is given.

    Raises:
        InputError: `source` is not an exported user or belongs to another backbone or other groups; the id cannot be
            one user's; or the run has a user of that name (without `force`), or had one who was deleted (without
            `deleted`).
        RunFolderError: the run has no groups stage yet.
    """
    RunFolder(folder).require_trained(Stage.GROUPS)
    groups = hash_file(RunFolder(folder).experts)
    record, written = read_user(source, run_origin(folder))
    made = {"by": "import", **({} if name in (None, record.user) else {"exported_as": record.user})}
    metadata = {**record.metadata, MADE: made}
    if "history" in metadata:  # it counts interactions in another run's log: all of this run's are new to the user
        metadata["history"] = {"run": None, "logged": 0}
    record = replace(record, user=record.user if name is None else name, metadata=metadata)
    try:
        require_id(record.user)
    except UserIdError as error:
        raise InputError(f"{source}: {error}; --user names another") from error
    _require_fit(folder, source, record)
    with _store(folder) as store:
        if store.head(record.user) is not None and not force:
            raise InputError(
                f"{folder}: has a user {record.user!r} already; --force replaces them, --user names another"
            )
        _require_undeleted(folder, record.user, deleted)
        with store.tombstones.lifted(DEFAULT_TENANT, [record.user] if deleted else []):
            store.put([record], only_if_bound={"groups": groups})
    router = _router(folder)
    return Imported(record, all(written.get(key) == value for key, value in router.items()))


def export_backbone(folder: Path, out: Path, *, force: bool = False) -> None:
    """Export the backbone with stage 1 merged, and its tokenizer, in transformers' format.

    Raises:
        InputError: `out` exists (without `force`), or the backbone is quantized, so that stage 1 cannot be merged.
        RunFolderError: the run has no population stage yet.
    """
    require_free(out, force)
    backbone = load(folder, Stage.POPULATION).model.backbone
    require_dense(folder, backbone)
    # Servers take the end tokens from the generation config; `load_backbone` has removed the checkpoint's own one.
    backbone.model.generation_config = GenerationConfig.from_model_config(backbone.model.config)
    with atomic_folder(out, shared=True) as place:
        backbone.model.save_pretrained(place)
        backbone.tokenizer.save_pretrained(place)
        origin = {"backbone": backbone.digest, "population": _hash(RunFolder(folder).population / PEFT_WEIGHTS)}
        write_json(place / DESCRIPTION, {"format": "proper-backbone", "version": 1, "origin": origin})


def run_origin(folder: Path) -> dict[str, str]:
    """Return the origin of this run's adapters: hashes of backbone, population and groups, and rank and alpha.

    Raises:
        RunFolderError: stages 1 and 2 are missing, or do not name their backbone.
    """
    config = _config(folder)
    run = RunFolder(folder)
    run.require_trained(Stage.GROUPS)
    marker = run.marker(Stage.GROUPS)
    stage = read_record(marker, "the stage has to be trained again", backbone=str)
    return {
        "backbone": str(stage["backbone"]),
        "population": _hash(RunFolder(folder).population / PEFT_WEIGHTS),
        "groups": _hash(RunFolder(folder).experts),
        "rank": str(config.users.rank),
        "alpha": str(config.users.alpha),
        **({} if config.users.layers == "all" else {"users.layers": str(config.users.layers)}),
        **({} if config.users.form == "lora" else {"users.form": config.users.form, **bases_digest(run.users.bases)}),
    }


def require_free(out: Path, force: bool) -> None:
    """Check that `out` can be written: it does not exist, or with `force` is an earlier export or an empty folder.

    Raises:
        InputError: `out` exists and may not be replaced.
    """
    if not out.exists():
        return
    if not force:
        raise InputError(f"{out}: exists already; --force replaces an earlier export")
    if not out.is_dir() or (any(out.iterdir()) and not (out / DESCRIPTION).is_file()):
        raise InputError(f"{out}: is not an earlier export (no {DESCRIPTION}), so --force does not replace it")


def _write_texts(path: Path, folder: Path, user: str) -> None:
    """Write all texts that the run has of a user, one JSON object per line; without texts no file is written."""
    with closing(InteractionLog(RunFolder(folder).users.path)) as log:
        rows = [*run_rows(RunFolder(folder).home.path, user), *logged_rows(log, DEFAULT_TENANT, user)]
    if rows:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_peft(
    place: Path,
    model: PersonalizedModel,
    history: Sequence[TextExample],
    user: str,
    state: Mapping[str, Any],
    base: str | None = None,
) -> None:
    """Fold one user and write the PEFT adapter to the existing folder `place`.

    Args:
        place: the folder.
        model: the run's model.
        history: the items over which the gates are averaged.
        user: the user.
        state: what the adapter belongs to; written beside it.
        base: `base_model_name_or_path` of the adapter's config.

    Raises:
        InputError: the history is empty.
        StoreError: the user's adapter is damaged.
    """
    folded = fold(model, user, history)
    layers, backbone = model.model.layers, model.model.backbone
    loras = uniform(folded.loras, served_rank(folded_rank(model)))
    inside = tuple(f"{name}." for name in layers)
    modules = [name for name, _ in backbone.model.named_modules() if not name.startswith(inside)]
    transposed = any(isinstance(layers[name].base, Conv1D) for name in loras)
    save_file(to_peft(loras), place / PEFT_WEIGHTS, metadata={"format": "pt"})
    config = adapter_config(loras, modules, fan_in_fan_out=transposed)
    write_json(place / PEFT_CONFIG, config | {"base_model_name_or_path": base})
    metadata: dict[str, Any] = {
        "format": "proper-peft",
        "version": 1,
        "user": user,
        "tier": model.tier(user),
        "rank": folded_rank(model),
        "items": len(history),
        "gates": {name: [round(gate, 6) for gate in gates.tolist()] for name, gates in folded.gates.items()},
    }
    write_json(place / DESCRIPTION, metadata | dict(state))


def require_dense(folder: Path, backbone: Backbone) -> None:
    """Raise an InputError if the backbone is quantized: the population stage cannot be merged into it for servers."""
    if backbone.quantized:
        raise InputError(f"{folder}: its backbone is quantized, so the LoRA of stage 1 cannot be merged for an export")


def _require_fit(folder: Path, source: Path, record: UserRecord) -> None:
    """Check that the record's tensors have this run's shapes, so that they can be served."""
    path = RunFolder(folder).experts
    tensors, metadata = load_tensors(path)
    mean = tensor_of(tensors, "mean_embedding", path)
    if record.embedding.shape != mean.shape:
        size = len(mean)
        raise InputError(f"{source}: its embedding has {len(record.embedding)} numbers, this run's have {size}")
    if record.adapter is None:
        return
    if not isinstance(metadata.get("modules"), list):
        raise StoreError(f"{path}: its metadata has no list of modules; restore a copy of it")
    sides = {m: [tensor_of(tensors, f"{m}.{side}", path) for side in ("down", "up")] for m in metadata["modules"]}
    shapes = {m: (down.shape[1], up.shape[0]) for m, (down, up) in sides.items()}
    users = _config(folder).users
    layout = Layout.of(user_targets(shapes, users), users.rank, {} if users.form == "core" else None)
    try:
        layout.pack(record.adapter, torch.empty(layout.width))
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error


def _require_undeleted(folder: Path, user: str, deleted: bool) -> None:
    with closing(InteractionLog(RunFolder(folder).users.path)) as log:
        if log.deletions.of(DEFAULT_TENANT, user) is not None:
            raise InputError(f"{folder}: user {user!r} is being deleted; 'proper users check {folder}' says how far")
        if log.tombstones.has(DEFAULT_TENANT, user) and not deleted:
            raise InputError(f"{folder}: user {user!r} was deleted from it; --even-if-deleted imports the user anyway")


def _existing(store: AdapterStore, user: str) -> UserRecord:
    record = store.get(user)
    if record is None:
        raise InputError(f"{store.folder}: there is no user {user!r}")
    return record


@contextmanager
def _store(folder: Path) -> Iterator[AdapterStore]:
    store = AdapterStore(RunFolder(folder).users.path)
    try:
        yield store
    finally:
        store.close()


def _config(folder: Path) -> Config:
    return load_run_config(require_run(folder).config)


def _router(folder: Path) -> dict[str, str]:
    """Return the hash of stage 3b's router, which all users share; an empty dict without a router."""
    path = RunFolder(folder).users.router
    return {"router": _hash(path)} if path.is_file() else {}


def run_data(folder: Path) -> Path:
    """Return the path of a run's prepared data, which further seeds share."""
    return RunFolder(folder).home.data


def _hash(path: Path) -> str:
    return hash_file(path)[:16]
