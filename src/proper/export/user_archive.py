"""One user's own state as a folder that another run of the same backbone and groups can take in.

    proper.json         who it is, their tier and facts, what it belongs to, the other file's sha256
    user.safetensors    embedding (D,), and PROJECTION.{A,B} stacked over layers, as the store has them

`origin` says what an adapter belongs to: hashes of backbone, population and groups, and the adapter's shape and scale.
It means nothing elsewhere. Knows nothing about run folders, or where the hashes come from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from proper.adapters.store import Tier, UserRecord
from proper.adapters.validation import fault_of
from proper.errors import InputError, ProperError
from proper.files import hash_file, read_json, write_json

FACTS = "proper.json"
"""The file that marks a folder as an export, whatever its format, and says what it is."""

_TENSORS = "user.safetensors"
_EMBEDDING = "embedding"


class Exported(BaseModel):
    """What proper.json says of a user.

    Attributes:
        version: of this format.
        origin: what the adapter belongs to, and what else it was made with.
        sha256: of the tensors' file.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["proper-user"] = "proper-user"
    version: Literal[1] = 1
    user: str
    tier: Tier
    facts: dict[str, Any]
    origin: dict[str, str]
    sha256: str


def write_user(folder: Path, record: UserRecord, origin: Mapping[str, str]) -> None:
    """Write a user's state into an empty folder."""
    tensors = {_EMBEDDING: record.embedding, **(record.adapter or {})}
    path = folder / _TENSORS
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    # A loss among the facts may be no number, which JSON does not have.
    facts = json.loads(json.dumps(dict(record.facts)), parse_constant=lambda _: None)
    said = Exported(user=record.user, tier=record.tier, facts=facts, origin=dict(origin), sha256=hash_file(path))
    write_json(folder / FACTS, said.model_dump())


def read_user(folder: Path, origin: Mapping[str, str]) -> tuple[UserRecord, dict[str, str]]:
    """Read what `write_user` wrote, if it belongs here; returns the user, and the origin as written.

    Args:
        folder: the exported user.
        origin: what must be the same.

    Raises:
        InputError: it is no exported user, is damaged, belongs to another origin (says which part differs), or has
            numbers that are not finite or absurdly large (names the tensor).
    """
    said = _read_facts(folder)
    for key, value in origin.items():
        if said.origin.get(key) != value:
            raise InputError(f"{folder}: belongs to another {key} ({said.origin.get(key)}, this run's is {value})")
    path = folder / _TENSORS
    try:
        if hash_file(path) != said.sha256:
            raise InputError(f"{path}: damaged: its sha256 is not the one in {FACTS}")
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    embedding = tensors.pop(_EMBEDDING, None)
    if embedding is None or embedding.dim() != 1 or (said.tier == "users") != bool(tensors):
        raise InputError(f"{path}: its tensors are not those of a user on the tier '{said.tier}'")
    fault = fault_of({_EMBEDDING: embedding, **tensors})
    if fault is not None:
        raise InputError(f"{path}: {fault}")
    return UserRecord(said.user, said.tier, embedding.float(), tensors or None, said.facts), said.origin


def _read_facts(folder: Path) -> Exported:
    path = folder / FACTS
    if not path.is_file():
        raise InputError(f"{folder}: not an exported user (no {FACTS})")
    try:
        return Exported.model_validate(read_json(path))
    except ProperError as error:
        raise InputError(str(error)) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "value"
        raise InputError(f"{path}: not an exported user: {where}: {first['msg']}") from error
