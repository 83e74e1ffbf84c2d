"""Safetensors files with JSON metadata: atomic writing, and reading with a clear error for damaged files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from proper.errors import ProperError
from proper.files import atomic_path


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata (`facts`) to one safetensors file, atomically."""
    flat = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(flat, temporary, metadata={"facts": json.dumps(dict(facts))})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the JSON metadata of a file that `save_tensors` wrote.

    Raises:
        ProperError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ProperError(f"{path}: damaged or unreadable: {error}") from error


def load_metadata(path: Path) -> dict[str, Any]:
    """Return only the JSON metadata of a file that `save_tensors` wrote.

    Raises:
        ProperError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts: dict[str, Any] = json.loads((file.metadata() or {}).get("facts", "{}"))
            return facts
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ProperError(f"{path}: damaged or unreadable: {error}") from error
