"""Exported users with damaged numbers and a valid checksum."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from proper.export.run_export import export_user

KINDS = ("nan", "huge", "nan-embedding")


def export(run: Path, user: str, folder: Path) -> None:
    """Write a user's export as `good` into a folder, and a spoiled copy of it for each of `KINDS`."""
    folder.mkdir()
    export_user(run, user, folder / "good")
    for kind in KINDS:
        shutil.copytree(folder / "good", folder / kind)
        _spoil(folder / kind, kind)


def _spoil(folder: Path, kind: str) -> None:
    path, facts = folder / "user.safetensors", folder / "proper.json"
    value = 1e30 if kind == "huge" else float("nan")
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and (name == "embedding") == (kind == "nan-embedding"):
            tensors[name] = torch.full_like(tensor, value)
    save_file(tensors, path)
    said = json.loads(facts.read_text(encoding="utf-8"))
    said["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    facts.write_text(json.dumps(said), encoding="utf-8")
