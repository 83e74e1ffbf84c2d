"""Conversion to and from the PEFT adapter format, as vLLM and other servers read it: one plain LoRA per module.

Token-level routing is not a plain LoRA. With constant gates g the method's layer is one, of rank E*R_g + R_u:

    delta = s_g * sum_i g_i B_i A_i + s_u B_u A_u = [s_g g_1 B_1 ... s_g g_E B_E  s_u B_u] [A_1; ...; A_E; A_u]

All functions are pure conversions of tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from proper.errors import InputError
from proper.layers.layout import Layout

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The LoRA ranks that vLLM accepts."""

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Lora:
    """LoRA of one module, fp32, which adds `up @ down @ x`; its scale is already multiplied into `up`."""

    down: Float[Tensor, "R I"]
    up: Float[Tensor, "O R"]

    @property
    def rank(self) -> int:
        """The rank R."""
        return int(self.down.shape[0])

    def padded(self, rank: int) -> Lora:
        """Return the same LoRA, zero-padded to `rank`.

        Raises:
            ValueError: its rank is already higher.
        """
        missing = rank - self.rank
        if missing < 0:
            raise ValueError(f"a LoRA of rank {self.rank} cannot be padded to rank {rank}")
        return Lora(
            torch.cat([self.down, self.down.new_zeros(missing, self.down.shape[1])]),
            torch.cat([self.up, self.up.new_zeros(self.up.shape[0], missing)], dim=1),
        )


def scaled(down: Float[Tensor, "R I"], up: Float[Tensor, "O R"], scale: float) -> Lora:
    """Return a LoRA (a user's own or stage 1's) with its scale multiplied into B, which leaves the map unchanged."""
    return Lora(down.detach().float().clone(), scale * up.detach().float())


def folded_experts(
    down: Float[Tensor, "E*R I"], up: Float[Tensor, "O E*R"], gates: Float[Tensor, "E"], scale: float
) -> Lora:
    """Return E fused experts under constant gates as one LoRA of rank E*R.

    Args:
        down: the A_i, stacked.
        up: the B_i, side by side.
        gates: the constant weight of each expert.
        scale: s_g, times the router's factor of the mixture.
    """
    ranks = down.shape[0] // gates.shape[0]
    weights = (gates.float() * scale).to(up.device).repeat_interleave(ranks)
    return Lora(down.detach().float().clone(), up.detach().float() * weights)


def joined(parts: Iterable[Lora]) -> Lora:
    """Return the sum of LoRAs on one module as one LoRA, whose rank is the sum of the ranks."""
    found = list(parts)
    return Lora(torch.cat([part.down for part in found]), torch.cat([part.up for part in found], dim=1))


def served_rank(rank: int) -> int:
    """Return the smallest rank in `RANKS` that is at least `rank`.

    Raises:
        InputError: `rank` is above all of them.
    """
    for known in RANKS:
        if known >= rank:
            return known
    raise InputError(f"a folded adapter of rank {rank} is more than other servers support ({RANKS[-1]})")


def uniform(loras: Mapping[str, Lora], rank: int) -> dict[str, Lora]:
    """Return all modules' LoRAs zero-padded to one rank: some modules may lack experts or the user's adapter."""
    return {name: lora.padded(rank) for name, lora in loras.items()}


def to_peft(loras: Mapping[str, Lora]) -> dict[str, Tensor]:
    """Return the tensors for PEFT's adapter_model.safetensors."""
    tensors = {}
    for name, lora in loras.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = lora.down.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = lora.up.contiguous()
    return tensors


def adapter_config(loras: Mapping[str, Lora], modules: Collection[str], *, fan_in_fan_out: bool) -> dict[str, Any]:
    """Return the content of PEFT's adapter_config.json, with `lora_alpha = r`, so that readers scale by 1.

    It has only keys that every version of PEFT knows; PEFT fills in the rest.

    Args:
        loras: the exported LoRAs, all of one rank.
        modules: the names of all modules of the backbone, so that `target_modules` matches no other by accident.
        fan_in_fan_out: whether the adapted layers store their weights as (I, O), as GPT-2's Conv1D does.

    Raises:
        ValueError: the ranks differ.
    """
    ranks = {lora.rank for lora in loras.values()}
    if len(ranks) != 1:
        raise ValueError(f"all modules must have one rank, not {sorted(ranks)}")
    rank = ranks.pop()
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        # A path of the merged backbone would hold on this machine only; the program that loads the adapter gives it.
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "target_modules": target_names(loras, modules),
        "modules_to_save": None,
    }


def target_names(written: Collection[str], modules: Collection[str]) -> list[str]:
    """Return the shortest dotted name endings that match the written modules and no others of `modules`.

    Servers expect names like `gate_proj`. Where such a name would match other modules (GPT-2's `c_proj`) the ending is
    longer, and where only some layers are written it is the whole name.
    """
    wanted, found = set(written), set()
    for name in wanted:
        parts = name.split(".")
        endings = (".".join(parts[at:]) for at in range(len(parts) - 1, -1, -1))
        found.add(next((end for end in endings if _meant(end, modules) <= wanted), name))
    return sorted(found)


def _meant(ending: str, modules: Collection[str]) -> set[str]:
    return {name for name in modules if name == ending or name.endswith(f".{ending}")}


def pack(loras: Mapping[str, Lora], layout: Layout) -> Float[Tensor, "P"]:
    """Return the LoRAs as a row of a bank slot, padded to the layout's rank; modules without a LoRA are zero."""
    row = torch.zeros(layout.width)
    for piece in layout.pieces:
        lora = loras.get(piece.module)
        if lora is not None:
            tensor = lora.padded(layout.rank)
            row[piece.offset : piece.offset + piece.size] = (tensor.down if piece.down else tensor.up).reshape(-1).cpu()
    return row
