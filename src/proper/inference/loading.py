"""Loading of a run folder for inference: backbone and weights of the trained stages, and the users' store."""

from __future__ import annotations

from pathlib import Path

import torch

from proper.adapters.store import AdapterStore
from proper.config import Config, load_config
from proper.errors import RunFolderError
from proper.files import hash_file, read_json
from proper.inference.model import PersonalizedModel, ServedUsers, Stage
from proper.layers.bank import AdapterBank
from proper.models.backbone import configured_backbone
from proper.models.checkpoints import load_groups, load_router
from proper.models.peft_merge import apply_population
from proper.models.personal import ProperModel


def load(folder: str | Path, stage: Stage | None = None) -> PersonalizedModel:
    """Load a run folder as one model for all its users.

    Args:
        folder: the run folder that `proper run` wrote.
        stage: the last stage to load; the last one that the folder has if None.

    Raises:
        RunFolderError: the folder is not a run folder, or the stage is missing from it.
        StoreError: the shared group tensors or routers have values that are not finite or absurdly large, or the store
            belongs to another backbone or other groups.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").exists():
        raise RunFolderError(
            f"{folder}: not a run folder (no config.yaml); make one with: proper run CONFIG --out {folder}"
        )
    config = load_config(folder / "config.yaml")
    stage = stage or last_stage(folder)
    backbone = configured_backbone(config)
    if stage != "base":
        _require(folder, "population")
        apply_population(backbone, folder / "population")
    model = ProperModel(backbone)
    served = None
    if stage in ("groups", "users"):
        served = serve_users(folder, config, model)
        if stage == "users":
            _require(folder, "users")
            load_router(model, config.users, folder / "users" / "router.safetensors")
    return PersonalizedModel(model, backbone.encoder(), config, served, stage)


def serve_users(folder: Path, config: Config, model: ProperModel) -> ServedUsers:
    """Load a run's experts and routers into a model, and open the store of its users.

    Raises:
        RunFolderError: stage 2 is missing.
        StoreError: the experts or routers have values that are not finite or absurdly large, or the store belongs to
            another backbone or other groups.
    """
    _require(folder, "groups")
    path = folder / "groups" / "groups.safetensors"
    mean = load_groups(model, config.groups, path)
    store = AdapterStore(folder / "users")
    store.require({"backbone": model.backbone.digest, "groups": hash_file(path)})
    slots = max(2, config.compute.batch_size)
    # The stored dtype: half the memory, a load is one copy, and matrix products run in the input's dtype anyway.
    dtype = torch.bfloat16 if config.users.storage == "bf16" else torch.float32
    layout = model.layout(config.users.rank)
    bank = AdapterBank(layout, slots, alpha=config.users.alpha, trainable=False, device=model.device, dtype=dtype)
    model.use_bank(bank)
    return ServedUsers(store, bank, mean)


def last_stage(folder: Path) -> Stage:
    """Return the last stage whose marker is in the folder; "base" without one."""
    stages: tuple[Stage, ...] = ("users", "groups", "population")
    for stage in stages:
        if (folder / stage / "stage.json").exists():
            return stage
    return "base"


def _require(folder: Path, stage: str) -> None:
    marker = folder / stage / "stage.json"
    if not marker.exists():
        raise RunFolderError(f"{folder}: stage '{stage}' is not there; run: proper run CONFIG --out {folder}")
    read_json(marker)
