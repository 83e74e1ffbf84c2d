"""Training checkpoints: one safetensors file per stage, replaced atomically, and step seeds.

No random state is stored: every step draws from a seed derived from (run seed, stage, step), so a resumed stage draws
the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from proper.models.checkpoints import load_metadata, load_tensors, save_tensors


def seed_of(*parts: Any) -> int:
    """Return a 63-bit seed derived from any values: the same values give the same seed on every machine."""
    text = json.dumps(parts, ensure_ascii=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass
class Checkpoint:
    """One stage's checkpoint file, written every `seconds`, or less often if writing takes long."""

    path: Path
    seconds: float
    _last: float = field(default_factory=time.monotonic)
    _took: float = 0.0

    def due(self) -> bool:
        """Return whether it is time to save; saving takes at most a twentieth of the training time."""
        return time.monotonic() - self._last >= max(self.seconds, min(20 * self._took, 20 * self.seconds))

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Replace the checkpoint."""
        started = time.monotonic()
        save_tensors(self.path, tensors, facts)
        self._last = time.monotonic()
        self._took = self._last - started

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the last saved tensors and metadata, or None if there is no checkpoint."""
        return load_tensors(self.path) if self.path.exists() else None

    def facts(self) -> dict[str, Any] | None:
        """Return the metadata of the last saved state without its tensors, or None if there is no checkpoint."""
        return load_metadata(self.path) if self.path.exists() else None

    def remove(self) -> None:
        """Remove the checkpoint of a stage that is done."""
        self.path.unlink(missing_ok=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """Return an optimizer's state as flat tensors "NAME/exp_avg" and so on."""
    return {
        f"{names[parameter]}/{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]
) -> None:
    """Restore an optimizer's state from the tensors of `optimizer_tensors`."""
    keys = ("step", "exp_avg", "exp_avg_sq")
    for parameter, name in names.items():
        if f"{name}/exp_avg" in tensors:
            state = {key: tensors[f"{name}/{key}"] for key in keys}
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
            }
