"""Training checkpoints: one safetensors file per stage, replaced atomically, and step seeds.

No random state is stored: every step draws from a seed derived from (run seed, stage, step), so a resumed stage draws
the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from proper.errors import ProperError, RunFolderError
from proper.models.checkpoints import load_metadata, load_tensors, save_tensors
from proper.models.memory import give_back_memory

T = TypeVar("T")


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

    def save(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Replace the checkpoint, and return to the system what the steps since the last one have freed."""
        started = time.monotonic()
        save_tensors(self.path, tensors, metadata)
        give_back_memory()
        self._last = time.monotonic()
        self._took = self._last - started

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the last saved tensors and metadata, or None if there is no checkpoint.

        Raises:
            RunFolderError: the file is damaged.
        """
        return self._read(load_tensors)

    def metadata(self) -> dict[str, Any] | None:
        """Return the metadata of the last saved state without its tensors, or None if there is no checkpoint.

        Raises:
            RunFolderError: the file is damaged.
        """
        return self._read(load_metadata)

    def _read(self, load: Callable[[Path], T]) -> T | None:
        try:
            return load(self.path) if self.path.exists() else None
        except ProperError as error:
            raise RunFolderError(f"{error}; remove it, and its part of the training begins again") from error

    def remove(self) -> None:
        """Remove the checkpoint of a stage that is done."""
        self.path.unlink(missing_ok=True)


def adamw_tensors(optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return parameters as "NAME" and their optimizer state as "NAME/exp_avg", "NAME/exp_avg_sq" and "NAME/step"."""
    tensors: dict[str, Tensor] = {name: parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        tensors |= {f"{name}/{key}": torch.as_tensor(value) for key, value in state.items()}
    return tensors


def restore_adamw(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Restore parameters and optimizer state from the tensors of `adamw_tensors`.

    Moments go to the parameters' devices; step counts stay on the CPU, where AdamW keeps them.
    """
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])
        if f"{name}/exp_avg" in tensors:
            moments = {key: tensors[f"{name}/{key}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": tensors[f"{name}/step"], **moments}


def resume_adamw(
    checkpoint: Checkpoint, optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter]
) -> tuple[int, dict[str, Tensor]]:
    """Restore a training loop from its checkpoint; return the steps done and all its tensors (0 and {} if none)."""
    saved = checkpoint.load()
    if saved is None:
        return 0, {}
    tensors, metadata = saved
    restore_adamw(optimizer, parameters, tensors)
    return int(metadata["step"]), tensors
