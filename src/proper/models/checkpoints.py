"""Checkpoints: safetensors files with JSON metadata, and loading of the stages' shared weights into a model.

Files are written atomically, with a checksum of their tensors and metadata, and a damaged one is an error that names
it: training that continued from a flipped bit would end without one. Files without a checksum are read as well. The
states of single users are in the adapter store, which this module does not open.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
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
    facts = json.dumps(dict(metadata))
    with atomic_path(path) as temporary:
        # One key, as safetensors writes several in a random order: the same content gives the same bytes.
        save_file(flat, temporary, metadata={"checked": f"{_sha256(flat, facts)} {facts}"})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the JSON metadata of a file that `save_tensors` wrote.

    Raises:
        ProperError: the file is damaged.
    """
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        checksum, facts = _checksum_and_facts(file.metadata())
        if checksum is not None and checksum != _sha256(tensors, facts):
            raise ValueError("its content does not have the checksum that it was written with")
        return tensors, _parsed(facts)


def load_sound_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what `load_tensors` returns, if all values are finite and of a plausible size.

    Raises:
        ProperError: the file is damaged.
        StoreError: it has values that are not finite or absurdly large.
    """
    tensors, metadata = load_tensors(path)
    _require_sound(tensors, path)
    return tensors, metadata


def load_metadata(path: Path) -> dict[str, Any]:
    """Return only the JSON metadata of a file that `save_tensors` wrote.

    Raises:
        ProperError: the file is damaged.
    """
    with _opened(path) as file:
        return _parsed(_checksum_and_facts(file.metadata())[1])


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; an error inside the block is a ProperError that names the file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, LookupError, RecursionError) as error:
        raise ProperError(f"{path}: damaged or unreadable: {error}") from error


def _sha256(tensors: Mapping[str, Tensor], facts: str) -> str:
    """Return a checksum of contiguous tensors on the CPU, their names and shapes, and the metadata."""
    found = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(json.dumps([name, str(tensor.dtype), tensor.shape]).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _checksum_and_facts(metadata: Mapping[str, str] | None) -> tuple[str | None, str]:
    """Return the checksum of a file, or None if it was written without one, and its metadata as JSON."""
    if not metadata or metadata.keys() == {"format"}:  # as PEFT and other programs write a file
        return None, "{}"
    if "checked" in metadata:
        checksum, _, facts = metadata["checked"].partition(" ")
        return checksum, facts
    if "facts" in metadata:
        return None, metadata["facts"]
    raise ValueError("its metadata is not that of a checkpoint")


def _parsed(facts: str) -> dict[str, Any]:
    found = json.loads(facts)
    if not isinstance(found, dict):
        raise ValueError(f"its metadata is a {type(found).__name__}, not a JSON object")
    return found


def tensor_of(tensors: Mapping[str, Tensor], name: str, path: Path) -> Tensor:
    """Return a tensor of a file.

    Raises:
        StoreError: the file does not have it.
    """
    if name not in tensors:
        raise StoreError(f"{path}: the tensor '{name}' is missing")
    return tensors[name]


def fill(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy the tensors of a file, which all users share, into the parameters of these names.

    Raises:
        StoreError: a tensor is missing, has another shape, or has values that are not finite, which would spoil every
            answer, or absurdly large.
    """
    _require_sound(tensors, path)
    for name, parameter in parameters.items():
        found = tensor_of(tensors, name, path)
        # A smaller tensor would be repeated, without an error.
        if found.shape != parameter.shape:
            shapes = f"{list(found.shape)}, the model has {list(parameter.shape)}"
            raise StoreError(f"{path}: the tensor '{name}' has the shape {shapes}")
        parameter.data.copy_(found)


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
    fill(model.group_parameters(), tensors, path)
    _freeze(model.group_parameters())
    return tensor_of(tensors, "mean_embedding", path)


def settled(config: Config, path: Path) -> Config:
    """Return a config with the number of experts that stage 2 saved in `path`, in place of `groups.experts: auto`.

    Without the file, the config is returned as it is.

    Raises:
        ProperError: the file is damaged.
    """
    if config.groups.experts != "auto" or not path.exists():
        return config
    with _opened(path) as file:
        routers = [name for name in file.keys() if name.endswith(".token")]  # noqa: SIM118
        return with_experts(config, file.get_slice(routers[0]).get_shape()[0])


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
        fill(model.router_parameters(), tensors, path)
        _freeze(model.router_parameters())


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
    tensors, _ = load_sound_tensors(path)
    placed = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    modules = [name.removesuffix(".A") for name in placed if name.endswith(".A")]
    model.bases = {each: (placed[f"{each}.A"], tensor_of(placed, f"{each}.B", path)) for each in modules}


def _require_sound(tensors: Mapping[str, Tensor], path: Path) -> None:
    fault = fault_of(tensors)
    if fault is not None:
        raise StoreError(f"{path}: {fault}")


def _freeze(parameters: Mapping[str, nn.Parameter]) -> None:
    for parameter in parameters.values():
        parameter.requires_grad_(False)
