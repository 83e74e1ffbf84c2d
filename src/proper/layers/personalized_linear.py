"""Personalized linear layer: a frozen base layer plus gated LoRA experts and each row's user LoRA.

    y = W x  +  s_g * sum_i b_i * B_i A_i x  +  h_u          (method: stages 2 and 3)

The base layer is only called, so it may be dense, quantized, GPT-2's Conv1D or a layer that already carries a LoRA.
The added terms depend on the current rows (`BatchContext`); with none set, the output is the base layer's.
`recipes/` (stage2_groups.py, stage3a_users.py, stage3b_router.py) trains the layer in short loops.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from proper.layers.bank import AdapterBank
from proper.layers.batch_context import BatchContext, RowContext
from proper.layers.dropout import dropout_mask
from proper.layers.experts import Experts
from proper.layers.routers import LoraAwareRouter, UserAwareRouter, at_least_fp32, gates_of


class AdaptedLinear(nn.Module):
    """A base layer with optional LoRA experts and their router, and an optional bank of user adapters.

    Attributes:
        base: the backbone's layer, frozen.
        experts, router: the experts and user-aware router of stage 2; None before it.
        bank: user adapters, shared by all layers of the model; None before stage 3.
        lora_router: the LoRA-aware router of stage 3b; None keeps the gates of stage 2.
        residual: whether 3b adds to stage 2's logits (default) or replaces them (the paper's form).
        user_dropout: dropout rate on the input of user adapters.
    """

    def __init__(self, name: str, base: nn.Module, inputs: int, outputs: int, routing: BatchContext) -> None:
        super().__init__()
        self.name, self.base, self.inputs, self.outputs, self.routing = name, base, inputs, outputs, routing
        # Code that searches for linear layers finds this module by these names, not the base inside it.
        self.in_features, self.out_features = inputs, outputs
        self.experts: Experts | None = None
        self.router: UserAwareRouter | None = None
        self.bank: AdapterBank | None = None
        self.lora_router: LoraAwareRouter | None = None
        self.residual = True
        self.user_dropout = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to (B, T, I), or to (B*T, I) where a backbone flattens its rows."""
        y: Tensor = self.base(x)
        rows = self.routing.rows
        if rows.mode == "off":
            return y
        shaped = x if x.dim() == 3 else x.reshape(rows.size, -1, self.inputs)
        total = y.reshape(*shaped.shape[:2], self.outputs)
        middle, total = self._user(shaped, total, rows)
        return self._mixture(shaped, total, middle, rows).reshape(y.shape)

    def _user(
        self, x: Float[Tensor, "B T I"], y: Float[Tensor, "B T O"], rows: RowContext
    ) -> tuple[Tensor | None, Float[Tensor, "B T O"]]:
        """Return A_u x, None where no row has an adapter, and y + h_u."""
        if rows.mode == "groups" or rows.slots is None or self.bank is None:
            return None, y
        if rows.generators is not None and self.user_dropout > 0:
            x = x * dropout_mask(x, self.user_dropout, rows)
        if rows.gathered is not None:
            cached = rows.gathered.adapters
            if self.name not in cached:
                # One token per row: on a CPU, products in fp32 take a fifth of the time of those in bf16.
                single = x.shape[1] == 1 and x.device.type == "cpu"
                dtype = torch.promote_types(x.dtype, torch.float32) if single else x.dtype
                cached[self.name] = self.bank.gathered(self.name, rows.slots, dtype)
            return self.bank.lora_of(x, cached[self.name], y)
        return self.bank.lora(self.name, x, rows.slots, onto=y, complete=rows.complete)

    def _mixture(
        self, x: Float[Tensor, "B T I"], y: Float[Tensor, "B T O"], middle: Tensor | None, rows: RowContext
    ) -> Float[Tensor, "B T O"]:
        """Return y plus the experts' gated sum."""
        if self.experts is None or self.router is None:
            return y
        if rows.embedding is None:
            raise RuntimeError("a mixture needs the user embedding of every row")
        inside, by_token = self.experts.products(x, self.router.token)
        scores = self.router.scores_of(by_token, rows.embedding, rows.tasks)
        if rows.mode == "users" and middle is not None and self.lora_router is not None:
            scores = self._own_scores(scores, middle, rows)
        gates = gates_of(scores)
        if rows.experts is not None:
            gates = gates.masked_fill(~rows.experts[:, None, None], 0)
        self.routing.record(self.name, gates)
        weights = gates if self.router.factor == 1 else gates * self.router.factor
        mixed: Tensor = self.experts(x, weights, onto=y, middle=inside)
        return mixed

    def _own_scores(self, scores: Tensor, middle: Float[Tensor, "B T R"], rows: RowContext) -> Float[Tensor, "B T E"]:
        """Return stage 3b's logits, with W_r h_u computed as M_u (A_u x); rows without an adapter keep stage 2's."""
        assert self.bank is not None and self.lora_router is not None and rows.slots is not None
        matrices = self._matrices(self.bank, self.lora_router, rows.slots, rows)
        own = torch.bmm(at_least_fp32(middle), matrices.transpose(1, 2))
        if self.residual:
            own = scores + own
        # Selected, not multiplied by zero: a NaN in slot 0 must not reach the rows without an adapter.
        return torch.where((rows.slots >= 0)[:, None, None], own, scores)

    def _matrices(
        self, bank: AdapterBank, router: LoraAwareRouter, slots: Int[Tensor, "B"], rows: RowContext
    ) -> Float[Tensor, "B E R"]:
        if rows.gathered is None:
            index = slots.clamp(min=0)
            down = bank.downs(self.name, index) if router.normalized else None
            return router.matrices(bank.ups(self.name, index), bank.scale, down)
        cached = rows.gathered.matrices
        if self.name not in cached:
            down, turned = rows.gathered.adapters[self.name]
            cached[self.name] = router.matrices_of(turned, bank.scale, down)
        return cached[self.name]
