"""Loading of a run folder for inference: backbone and weights of the trained stages, and the users' store."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import torch

from proper.adapters.store import AdapterStore
from proper.config import Config, load_run_config
from proper.errors import InputError, RunFolderError
from proper.files import atomic_path, hash_file
from proper.inference.model import PersonalizedModel, ServedUsers
from proper.models.backbone import configured_backbone
from proper.models.checkpoints import bases_digest, load_bases, load_groups, load_router, settled
from proper.models.peft_merge import apply_population
from proper.models.personal import ProperModel
from proper.run_folder import STAGE_METHODS, RunFolder, Stage, Tier, require_run


def load(folder: str | Path, stage: str | None = None) -> PersonalizedModel:
    """Load a run folder as one model for all its users.

    Args:
        folder: the run folder that `proper run` wrote.
        stage: the last stage to load; the last one that the folder has if None.

    Raises:
        InputError: there is no such stage.
        RunFolderError: the folder is not a run folder, or the stage is missing from it.
        StoreError: the shared group tensors or routers have values that are not finite or absurdly large, or the store
            belongs to another backbone or other groups.
    """
    run = require_run(Path(folder))
    config = settled(load_run_config(run.config), run.experts)
    if stage is not None and stage not in STAGE_METHODS:
        raise InputError(f"there is no stage {stage!r}; stages are: {', '.join(STAGE_METHODS)}")
    tier = last_stage(run) if stage is None else Tier(stage)
    backbone = configured_backbone(config)
    if tier != Tier.BASE:
        run.require_trained(Stage.POPULATION)
        apply_population(backbone, run.population)
    model = ProperModel(backbone)
    served = None
    if tier in (Tier.GROUPS, Tier.USERS):
        served = serve_users(run.path, config, model)
        if tier == Tier.USERS:
            run.require_trained(Stage.USERS)
            load_router(model, config.users, run.users.router)
            if config.users.form == "core" and not model.bases:
                raise RunFolderError(f"{run.users.bases}: is missing, and users' adapters cannot be used without it")
    return PersonalizedModel(model, backbone.encoder(), config, served, tier)


def serve_users(folder: Path, config: Config, model: ProperModel) -> ServedUsers:
    """Load a run's experts and routers into a model, and open the store of its users.

    Raises:
        RunFolderError: stage 2 is missing.
        StoreError: the experts or routers have values that are not finite or absurdly large, or the store belongs to
            another backbone or other groups.
    """
    run = RunFolder(folder)
    run.require_trained(Stage.GROUPS)
    store = AdapterStore(run.users.path)
    settle_groups(run, store)
    mean, groups = load_groups(model, config.groups, run.experts, len(config.tasks)), hash_file(run.experts)
    trained_on = {"backbone": model.backbone.digest, "groups": groups, **config.users.adapter_shape}
    store.require({**trained_on, **bases_digest(run.users.bases)})
    load_bases(model, run.users.bases)
    slots = max(2, config.compute.batch_size)
    # The stored dtype: half the memory, a load is one copy, and matrix products run in the input's dtype anyway.
    dtype = torch.bfloat16 if config.users.storage == "bf16" else torch.float32
    return ServedUsers(store, model.add_bank(config.users, slots, dtype=dtype), mean, groups)


def settle_groups(run: RunFolder, store: AdapterStore) -> None:
    """Replace the groups by the refreshed ones if the store is bound to them already, as after a kill.

    The replaced groups are kept as the previous ones, unless this completes a return to the previous groups.
    """
    if not run.refreshed.exists() or store.manifest.metadata().get("groups") != hash_file(run.refreshed):
        return
    back = run.previous.exists() and hash_file(run.previous) == hash_file(run.refreshed)
    if not back:
        with atomic_path(run.previous) as temporary:
            shutil.copyfile(run.experts, temporary)
    # The store has the embeddings by now.
    run.users.refresh.unlink(missing_ok=True)
    with suppress(OSError):  # not empty, or not there
        run.users.work.rmdir()
    run.refreshed.replace(run.experts)
    if back:
        run.previous.unlink()


def last_stage(run: RunFolder) -> Tier:
    """Return the tier of the last trained stage; BASE without one."""
    trained = [stage for stage in Stage if run.is_trained(stage)]
    return Tier(trained[-1].value) if trained else Tier.BASE
