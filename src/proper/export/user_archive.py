"""User archive: one user's own state as a folder that another run of the same backbone and groups can import.

    proper.json         user id, tier and metadata (facts), the origin, and the other file's sha256
    user.safetensors    embedding (D,), and PROJECTION.{A,B} stacked over layers, as in the store

`origin` identifies what an adapter was trained on: hashes of backbone, population and groups, and the adapter's rank
and alpha. With another origin the adapter is meaningless.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from proper.adapters.serialization import fault_of
from proper.adapters.store import UserRecord
from proper.errors import InputError, ProperError
from proper.files import hash_file, read_json, write_json
from proper.run_folder import Tier

DESCRIPTION = "proper.json"
"""The file that marks a folder as an export of any format and describes it."""

_TENSORS = "user.safetensors"
_EMBEDDING = "embedding"


class Exported(BaseModel):
    """Content of a user archive's proper.json.

    Attributes:
        version: version of this format.
        origin: hashes and settings that the adapter belongs to, and the hash of the router it was trained with.
        sha256: hash of user.safetensors.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["proper-user"] = "proper-user"
    version: Literal[1] = 1
    user: str
    tier: Literal["groups", "users"]
    facts: dict[str, Any]
    origin: dict[str, str]
    sha256: str


def write_user(folder: Path, record: UserRecord, origin: Mapping[str, str]) -> None:
    """Write a user's state into an empty folder."""
    tensors = {_EMBEDDING: record.embedding, **(record.adapter or {})}
    path = folder / _TENSORS
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    # A loss in the metadata may be NaN, which JSON does not have; it becomes null.
    metadata = json.loads(json.dumps(dict(record.metadata)), parse_constant=lambda _: None)
    tier: Literal["groups", "users"] = "users" if record.tier == Tier.USERS else "groups"
    exported = Exported(user=record.user, tier=tier, facts=metadata, origin=dict(origin), sha256=hash_file(path))
    write_json(folder / DESCRIPTION, exported.model_dump())


def read_user(folder: Path, origin: Mapping[str, str]) -> tuple[UserRecord, dict[str, str]]:
    """Read a user archive that `write_user` wrote; return the user's record and the written origin.

    Args:
        folder: the archive.
        origin: required origin: each of its keys must have the same value in the archive.

    Raises:
        InputError: `folder` is not an exported user, is damaged, belongs to another origin (names the key that
            differs), or has values that are not finite or absurdly large (names the tensor).
    """
    exported = _read_description(folder)
    for key, value in origin.items():
        if exported.origin.get(key) != value:
            raise InputError(f"{folder}: belongs to another {key} ({exported.origin.get(key)}, this run's is {value})")
    path = folder / _TENSORS
    try:
        if hash_file(path) != exported.sha256:
            raise InputError(f"{path}: damaged: its sha256 is not the one in {DESCRIPTION}")
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    embedding = tensors.pop(_EMBEDDING, None)
    if embedding is None or embedding.dim() != 1 or (exported.tier == "users") != bool(tensors):
        raise InputError(f"{path}: its tensors are not those of a user on the tier '{exported.tier}'")
    fault = fault_of({_EMBEDDING: embedding, **tensors})
    if fault is not None:
        raise InputError(f"{path}: {fault}")
    record = UserRecord(exported.user, Tier(exported.tier), embedding.float(), tensors or None, exported.facts)
    return record, exported.origin


def _read_description(folder: Path) -> Exported:
    path = folder / DESCRIPTION
    if not path.is_file():
        raise InputError(f"{folder}: not an exported user (no {DESCRIPTION})")
    try:
        return Exported.model_validate(read_json(path))
    except ProperError as error:
        raise InputError(str(error)) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "value"
        raise InputError(f"{path}: not an exported user: {where}: {first['msg']}") from error
