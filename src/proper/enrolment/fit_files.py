"""Files of an unfinished fit in its work folder: its history, the version it is trained from, the embedding."""

from __future__ import annotations

import shutil
from pathlib import Path

from proper.enrolment.fit_embedding import FittedEmbedding
from proper.enrolment.history import UserHistory
from proper.files import read_json, write_json
from proper.json_records import read_record
from proper.models.checkpoints import load_tensors, save_tensors

_HISTORY, _UPDATE, _EMBEDDING = "history.json", "update.json", "embedding.safetensors"


def same_history(work: Path, grown: UserHistory, groups: str | None) -> None:
    """Remove the work folder if a fit of another history, or with other groups (by their hash), left it."""
    marker, content = work / _HISTORY, {"digest": grown.digest, "groups": groups}
    if marker.exists() and read_json(marker) == content:
        return
    shutil.rmtree(work, ignore_errors=True)
    write_json(marker, content)


def same_update(work: Path, grown: UserHistory, version: int, state: str) -> None:
    """Remove the work folder if another update, or another fit, left it.

    Args:
        work: the work folder.
        grown: the history.
        version: the version that the update is trained from.
        state: a hash of that version and of the settings.
    """
    marker, content = work / _UPDATE, {"history": grown.digest, "version": version, "state": state}
    if marker.exists() and read_json(marker) == content:
        return
    shutil.rmtree(work, ignore_errors=True)
    write_json(marker, content)


def is_update_of(work: Path, grown: UserHistory, version: int) -> bool:
    """Return whether the work folder is that of an update from this version with this history."""
    marker = work / _UPDATE
    if not marker.exists():
        return False
    content = read_record(marker, history=str, version=int)
    return (content["history"], content["version"]) == (grown.digest, version)


def save_embedding(work: Path, found: FittedEmbedding) -> None:
    """Write the fitted embedding, from which an interrupted fit goes on."""
    metadata = {"losses": list(found.losses), "passes": found.passes}
    save_tensors(work / _EMBEDDING, {"embedding": found.embedding}, metadata)


def load_embedding(work: Path) -> FittedEmbedding | None:
    """Return the embedding that `save_embedding` wrote; None if there is none."""
    path = work / _EMBEDDING
    if not path.exists():
        return None
    tensors, metadata = load_tensors(path)
    return FittedEmbedding(tensors["embedding"], tuple(metadata["losses"]), metadata["passes"])
