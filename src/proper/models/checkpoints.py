"""Checkpoints: safetensors files with JSON metadata, and loading of the stages' shared weights into a model.

Files are written atomically, and a damaged one is an error that names it. The states of single users are in the adapter
store, which this module does not open.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from proper.adapters.serialization import fault_of
from proper.config import Config, GroupsConfig, UsersConfig
from proper.errors import ProperError, StoreError
from proper.files import atomic_path, hash_file
from proper.models.personal import ProperModel


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata to one safetensors file, atomically."""
    flat = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(flat, temporary, metadata={"facts": json.dumps(dict(metadata))})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the JSON metadata of a file that `save_tensors` wrote.

    Raises:
        ProperError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("facts", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ProperError(f"{path}: damaged or unreadable: {error}") from error


def load_metadata(path: Path) -> dict[str, Any]:
    """Return only the JSON metadata of a file that `save_tensors` wrote.

    Raises:
        ProperError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = json.loads((file.metadata() or {}).get("facts", "{}"))
            return metadata
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ProperError(f"{path}: damaged or unreadable: {error}") from error


def load_groups(model: ProperModel, config: GroupsConfig, path: Path, tasks: int = 0) -> Float[Tensor, "D"]:
    """Add experts and user-aware routers to a model with the weights that stage 2 saved; return the mean embedding.

    `tasks` is the number of tasks, where the run has several.

    Raises:
        ProperError: the file is damaged.
        StoreError: its modules are not those of the config, or it has values that are not finite or absurdly large.
    """
    model.add_experts(config, seed=0, tasks=tasks)
    tensors, _ = load_tensors(path)
    missing = model.group_parameters().keys() ^ (tensors.keys() - {"mean_embedding"})
    if missing:
        raise StoreError(
            f"{path}: its modules are not those of groups.target_modules and groups.layers: {min(missing)}"
        )
    _copy(model.group_parameters(), tensors, path)
    return tensors["mean_embedding"]


def settled(config: Config, path: Path) -> Config:
    """Return a config with the number of experts that stage 2 saved in `path`, in place of `groups.experts: auto`.

    Without the file, the config is returned as it is.

    Raises:
        ProperError: the file is damaged.
    """
    if config.groups.experts != "auto" or not path.exists():
        return config
    try:
        with safe_open(path, framework="pt") as file:
            routers = [name for name in file.keys() if name.endswith(".token")]  # noqa: SIM118
            number = file.get_slice(routers[0]).get_shape()[0]
    except (SafetensorError, OSError, IndexError) as error:
        raise ProperError(f"{path}: damaged or unreadable: {error}") from error
    return with_experts(config, number)


def with_experts(config: Config, number: int) -> Config:
    """Return a config with this number of experts."""
    return config.model_copy(update={"groups": config.groups.model_copy(update={"experts": number})})


def load_router(model: ProperModel, config: UsersConfig, path: Path) -> None:
    """Add LoRA-aware routers to a model, with the weights that stage 3b saved if the file exists.

    Raises:
        ProperError: the file is damaged.
        StoreError: it has values that are not finite or absurdly large.
    """
    model.add_lora_router(config)
    if path.exists():
        tensors, _ = load_tensors(path)
        _copy(model.router_parameters(), tensors, path)


def bases_digest(path: Path) -> dict[str, str]:
    """Return the hash of the bases, which an adapter store is bound to; an empty dict if the file does not exist."""
    return {"bases": hash_file(path)} if path.exists() else {}


def load_bases(model: ProperModel, path: Path) -> None:
    """Put the bases of the form `core` into a model if the file exists: MODULE.A (R, I) and MODULE.B (O, R).

    Raises:
        ProperError: the file is damaged.
        StoreError: it has values that are not finite or absurdly large.
    """
    if not path.exists():
        return
    tensors, _ = load_tensors(path)
    fault = fault_of(tensors)
    if fault is not None:
        raise StoreError(f"{path}: {fault}")
    placed = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    model.bases = {name[:-2]: (placed[name], placed[f"{name[:-2]}.B"]) for name in placed if name.endswith(".A")}


def _copy(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy tensors that all users share into frozen parameters; a NaN among them would spoil every answer."""
    fault = fault_of(tensors)
    if fault is not None:
        raise StoreError(f"{path}: {fault}")
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])
        parameter.requires_grad_(False)
