"""Folding of a user's expert mixture and adapter into one plain LoRA per module, with gates averaged over the history.

    g = mean over the tokens of the user's history of the gates that serve them      (per module)

The gates are those of exact serving: with the user's embedding and, on the users tier, with the user's adapter and the
LoRA-aware router. Averaging them is what `static-export` loses against exact serving.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from proper.data.batching import by_length, collate
from proper.data.histories import TextExample
from proper.errors import InputError
from proper.export.peft_format import Lora, folded_experts, joined, scaled, uniform
from proper.inference.model import PersonalizedModel
from proper.layers.batch_context import RowContext
from proper.layers.personalized_linear import AdaptedLinear


@dataclass(frozen=True)
class Folded:
    """A user's folded LoRAs under constant gates.

    Attributes:
        loras: one LoRA per module, on the CPU, all of rank E*R_g + R_u; zero where a module adds nothing.
        gates: the mean gates (E,) that were used, per module with experts.
    """

    loras: dict[str, Lora]
    gates: dict[str, Float[Tensor, "E"]]


def fold(model: PersonalizedModel, user: str, history: Sequence[TextExample]) -> Folded:
    """Fold one user's experts and adapter, at the tier that the model serves the user.

    Raises:
        InputError: the history is empty, so that the gates cannot be averaged.
        StoreError: the user's adapter is damaged.
    """
    gates = history_gates(model, user, history)
    return Folded(fold_with(model, user, gates), gates)


def history_gates(model: PersonalizedModel, user: str, history: Sequence[TextExample]) -> dict[str, Float[Tensor, "E"]]:
    """Return the user's mean gates per module with experts, over all tokens of the history, answers included.

    Raises:
        InputError: the history is empty.
    """
    if not history:
        raise InputError(f"user {user!r} has no history in this run to average the gates over")
    encoded = [model.encoder.encode(example) for example in history]
    sums: dict[str, Tensor] = {}
    tokens = 0
    limit = model.model.backbone.batch_tokens
    for chunk in by_length([len(row.ids) for row in encoded], model.config.compute.batch_size, limit):
        batch = collate([encoded[i] for i in chunk], model.model.backbone.pad_id, model.model.device)
        served = model.rows([user] * len(chunk))
        one = torch.zeros(len(chunk), dtype=torch.long, device=model.model.device)
        rows = RowContext(served.mode, served.embedding, served.slots, users=one, mask=batch.attention_mask.bool())
        with torch.no_grad():
            model.model.answer_logits(batch, rows)
        for name, gates in model.model.routing.gates.items():
            sums[name] = sums.get(name, 0) + gates[0].double().cpu() * batch.tokens
        tokens += batch.tokens
    return {name: (total / tokens).float() for name, total in sums.items()}


def fold_with(model: PersonalizedModel, user: str, gates: Mapping[str, Float[Tensor, "E"]]) -> dict[str, Lora]:
    """Return the user's LoRA per module under these constant gates, all padded to one rank."""
    slots = model.rows([user]).slots
    slot = -1 if slots is None else int(slots[0])
    layers = model.model.layers.items()
    return uniform({name: joined(_parts(layer, slot, gates.get(name))) for name, layer in layers}, folded_rank(model))


def folded_rank(model: PersonalizedModel) -> int:
    """Return E*R_g + R_u, the rank of every user's folded adapter on any tier."""
    return max(
        (layer.experts.experts * layer.experts.rank if layer.experts is not None else 0)
        + (layer.bank.layout.rank if layer.bank is not None else 0)
        for layer in model.model.layers.values()
    )


def _parts(layer: AdaptedLinear, slot: int, gates: Float[Tensor, "E"] | None) -> list[Lora]:
    """Return a LoRA of rank 0, then the gated experts and the user's own LoRA, if the layer has them."""
    found = [Lora(torch.zeros(0, layer.inputs), torch.zeros(layer.outputs, 0))]
    if layer.experts is not None and layer.router is not None and gates is not None:
        scale = layer.experts.scale * layer.router.factor
        found.append(folded_experts(layer.experts.down.cpu(), layer.experts.up.cpu(), gates, scale))
    if layer.bank is not None and slot >= 0 and layer.name in layer.bank:
        one = torch.tensor([slot], device=layer.bank.values.device)
        down, up = layer.bank.downs(layer.name, one)[0], layer.bank.ups(layer.name, one)[0]
        found.append(scaled(down.cpu(), up.cpu(), layer.bank.scale))
    return found
