"""Training of the bases A and B of the form `core`, which all users share, before any user's core is fitted.

LoRAs of the users are trained from one common start, on the items that the users' trials train on. Per module, A then
spans the rows and B the columns that the products B_u A_u have in common: truncated singular vectors of all of them (a
Tucker-2 decomposition by HOSVD, De Lathauwer et al. 2000). A has orthonormal rows and B orthogonal columns of mean
square 1, so that a core's numbers act like a LoRA's B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from proper.config import UsersConfig
from proper.files import private_folder
from proper.layers.layout import Bases, Layout
from proper.models.checkpoints import load_bases, save_tensors
from proper.models.personal import ProperModel
from proper.training.checkpoint import seed_of
from proper.training.starts import common_start, older_adapters
from proper.training.user_stage import UserStage

SOURCE_RANK = 4
"""Rank of the LoRAs that `stacked` decomposes."""


def train_bases(stage: UserStage, path: Path) -> None:
    """Put the bases of the form `core` into the stage's model: those of the file, or new ones, which are written to it.

    With the form `lora`, nothing is done.
    """
    if stage.config.form == "lora":
        return
    if not path.exists():
        private_folder(stage.folder)
        found = stacked_bases(stage)
        tensors = {f"{name}.{part}": own for name, pair in found.items() for part, own in zip("AB", pair, strict=True)}
        save_tensors(path, tensors, {})
    load_bases(stage.model, path)


def stacked_bases(stage: UserStage) -> Bases:
    """Return bases from LoRAs of the users; random ones if no user has items besides the held-out ones."""
    config = stage.config.model_copy(update={"form": "lora", "rank": SOURCE_RANK})
    source = replace(stage, config=config)
    layout = stage.model.user_layout(config)
    # With an A of their own, the users' products would have no rows in common.
    adapters = list(older_adapters(source, common_start(source), "bases"))
    if not adapters:
        draw = torch.Generator().manual_seed(seed_of(stage.seed, "bases"))
        return random_bases(stage.model, stage.config, draw)
    return decomposed(adapters, layout, stage.config.rank)


def decomposed(adapters: Sequence[Mapping[str, Tensor]], layout: Layout, rank: int) -> Bases:
    """Return, per module, the bases of this rank that hold most of the adapters' products.

    With the thin QR decompositions B_u = Q S and A_u^T = P T, the rows of B_u A_u have the Gram matrix
    (S A_u)^T (S A_u) and its columns (T B_u^T)^T (T B_u^T): no product is ever formed.

    Args:
        adapters: stacked tensors as `Layout.unpack` gives them.
        layout: their layout.
        rank: R.
    """
    modules: dict[str, list[str]] = {}
    for piece in layout.pieces:
        if piece.down:
            modules.setdefault(piece.projection, []).append(piece.module)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for projection, names in modules.items():
        for at, name in enumerate(names):
            pairs = [(own[f"{projection}.A"][at], own[f"{projection}.B"][at]) for own in adapters]
            rows = torch.cat([torch.linalg.qr(up).R @ down for down, up in pairs])
            columns = torch.cat([torch.linalg.qr(down.mT).R @ up.mT for down, up in pairs])
            found[name] = _scaled(_leading(rows, rank), _leading(columns, rank))
    return found


def random_bases(model: ProperModel, config: UsersConfig, generator: torch.Generator) -> Bases:
    """Return random orthogonal bases for the modules that get user adapters."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for piece in model.user_layout(config).pieces:
        layer = model.layers[piece.module]
        down, up = (torch.randn(config.rank, size, generator=generator) for size in (layer.inputs, layer.outputs))
        found[piece.module] = _scaled(_leading(down, config.rank), _leading(up, config.rank))
    return {name: (down.to(model.device), up.to(model.device)) for name, (down, up) in found.items()}


def _leading(rows: Float[Tensor, "N I"], rank: int) -> Float[Tensor, "R I"]:
    """Return the first `rank` right singular vectors, filled up with orthogonal ones where there are fewer."""
    vectors: Tensor = torch.linalg.svd(rows, full_matrices=False).Vh[:rank]
    missing = rank - len(vectors)
    if missing > 0:
        draw = torch.randn(missing, rows.shape[1], generator=torch.Generator().manual_seed(0)).to(rows)
        vectors = torch.linalg.qr(torch.cat([vectors, draw]).mT).Q.mT
    return vectors


def _scaled(rows: Float[Tensor, "R I"], columns: Float[Tensor, "R O"]) -> tuple[Tensor, Tensor]:
    """Return A and B from orthonormal ones, B with columns of mean square 1."""
    return rows.contiguous(), (columns.mT * math.sqrt(columns.shape[1])).contiguous()
