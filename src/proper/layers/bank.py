"""Multi-LoRA bank: S slots, each holding one user's LoRA weights for every adapted module, with batched LoRA products.

All parameters of a slot lie in one row of one buffer, so loading a user is one copy and an optimizer step over many
users is a handful of vectorized operations. The modules see views: A (S, R, I) and B (S, O, R). Within a row, the
tensors of one projection (say, all layers' gate_proj A) lie side by side, which is how they are stored on disk.
Slots are numbers; `SlotCache` maps users to slots. `recipes/stage3a_users.py` trains a bank with one slot per
user in a short loop.

In the form `core` (`users.form`), all users share a module's bases A (R, I) and B (O, R), and a slot holds one core
C_u (R, R) per module: B C_u A x. The bases belong to the layout, so whatever has the layout has them.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from proper.layers.layout import Layout


class AdapterBank:
    """S slots of user LoRA adapters, fp32 by default, with a gradient buffer if trainable.

    Attributes:
        values: all slots' parameters (S, P).
        gradients: all slots' gradients (S, P), or None for a bank that is not trained.
        down, up: per module, the A (S, R, I) and B (S, O, R) of all slots, views of `values`. They have no `.grad`:
            the backward passes of `lora` and `take` add to `gradients`. Empty in the form `core`.
        core: per module, the C (S, R, R) of all slots in the same way. Empty in the form `lora`.
    """

    def __init__(
        self,
        layout: Layout,
        slots: int,
        *,
        alpha: float,
        trainable: bool,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.layout, self.slots, self.scale = layout, slots, alpha / layout.rank
        self.values = torch.zeros(slots, layout.width, device=device, dtype=dtype)
        self.gradients = torch.zeros_like(self.values) if trainable else None
        self.down: dict[str, nn.Parameter] = {}
        self.up: dict[str, nn.Parameter] = {}
        self.core: dict[str, nn.Parameter] = {}
        self._gradient: dict[nn.Parameter, Tensor] = {}
        for piece in layout.pieces:
            span = slice(piece.offset, piece.offset + piece.size)
            view = nn.Parameter(self.values[:, span].view(slots, *piece.shape), requires_grad=trainable)
            if self.gradients is not None:
                self._gradient[view] = self.gradients[:, span].view(slots, *piece.shape)
            {"A": self.down, "B": self.up, "C": self.core}[piece.part][piece.module] = view

    def __contains__(self, module: str) -> bool:
        return module in self.up or module in self.core

    def fresh(self, slot: int, generator: torch.Generator) -> None:
        """Initialize a slot with values drawn from `generator`: every A Kaiming-uniform, every B and C zero."""
        row = self.values[slot].zero_()
        for piece in self.layout.pieces:
            if piece.down:
                bound = piece.shape[1] ** -0.5
                draw = torch.rand(piece.size, generator=generator) * (2 * bound) - bound
                row[piece.offset : piece.offset + piece.size] = draw.to(row.device)

    def take(self, view: nn.Parameter, slots: Int[Tensor, "B"]) -> Float[Tensor, "B J K"]:
        """Return `view[slots]` for a view of `down`, `up` or `core`, differentiably."""
        if view not in self._gradient or not view.requires_grad:
            return view[slots]
        taken: Tensor = _Take.apply(view, self._gradient[view], slots)  # type: ignore[no-untyped-call]
        return taken

    def downs(self, module: str, slots: Int[Tensor, "B"]) -> Float[Tensor, "B R I"]:
        """Return A_u of each slot, differentiably."""
        if module in self.down:
            return self.take(self.down[module], slots)
        return self.bases(module)[0].expand(len(slots), -1, -1)

    def ups(self, module: str, slots: Int[Tensor, "B"]) -> Float[Tensor, "B O R"]:
        """Return B_u of each slot, differentiably; in the form `core`, B C_u."""
        if module in self.up:
            return self.take(self.up[module], slots)
        up, own = self.bases(module)[1], self.take(self.core[module], slots)
        return up @ own.to(up.dtype)

    def bases(self, module: str) -> tuple[Float[Tensor, "R I"], Float[Tensor, "O R"]]:
        """Return the shared A and B of a module, in the form `core`.

        Raises:
            RuntimeError: the model has no bases yet.
        """
        if not self.layout.bases:
            raise RuntimeError("users.form: core needs the shared bases, which stage 3 trains first")
        return self.layout.bases[module]

    def lora(
        self,
        module: str,
        x: Float[Tensor, "B T I"],
        slots: Int[Tensor, "B"],
        onto: Float[Tensor, "B T O"] | None = None,
        *,
        complete: bool = False,
    ) -> tuple[Float[Tensor, "B T R"], Float[Tensor, "B T O"]]:
        """Return A_u x and h_u = s_u B_u A_u x for each row's user; h_u is zero for rows with slot -1.

        With `onto`, the second result is `onto` + h_u, computed in one pass. `complete` promises that no slot is -1.
        """
        if self.layout.bases is not None:
            return self._through_core(module, x, slots, onto, complete)
        down, up = self.down[module], self.up[module]
        buffers = (self._gradient.get(down), self._gradient.get(up)) if down.requires_grad else None
        found: tuple[Tensor, Tensor] = _Lora.apply(  # type: ignore[no-untyped-call]
            x, onto, down, up, slots, None if complete else (slots < 0).view(-1, 1, 1), self.scale, buffers
        )
        return found

    def _through_core(
        self, module: str, x: Float[Tensor, "B T I"], slots: Int[Tensor, "B"], onto: Tensor | None, complete: bool
    ) -> tuple[Float[Tensor, "B T R"], Float[Tensor, "B T O"]]:
        """Return A x and h_u = s_u B C_u A x: two products that all rows share, and one small one for each row."""
        down, up = (part.to(x.dtype) for part in self.bases(module))
        own = self.take(self.core[module], slots if complete else slots.clamp(min=0)).to(x.dtype)
        if not complete:
            own = own.masked_fill((slots < 0).view(-1, 1, 1), 0)
        middle = nn.functional.linear(x, down)
        out = nn.functional.linear(torch.bmm(middle, own.mT) * self.scale, up)
        return middle, out if onto is None else onto + out.to(onto.dtype)

    def gathered(
        self, module: str, slots: Int[Tensor, "B"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "B R I"], Float[Tensor, "B R O"]]:
        """Return each row's A_u and transposed B_u in `dtype`, zeros for rows with slot -1, for repeated decoding."""
        index, absent = slots.clamp(min=0), (slots < 0).view(-1, 1, 1)
        if self.layout.bases is not None:
            shared = self.downs(module, index).to(dtype)
            return shared, self.ups(module, index).to(dtype).mT.contiguous().masked_fill_(absent, 0)
        down, up = _rows(self.down[module], index, dtype), _rows(self.up[module], index, dtype).mT.contiguous()
        return down.masked_fill_(absent, 0), up.masked_fill_(absent, 0)

    def lora_of(
        self, x: Float[Tensor, "B T I"], own: tuple[Tensor, Tensor], onto: Float[Tensor, "B T O"]
    ) -> tuple[Float[Tensor, "B T R"], Float[Tensor, "B T O"]]:
        """Return A_u x and `onto` + h_u, computed without gradients in the dtype of `own`, the result of `gathered`."""
        down, up = own
        middle = torch.bmm(down, x.to(down.dtype).mT)
        return middle.mT, torch.baddbmm(onto.to(down.dtype), (middle * self.scale).mT, up).to(onto.dtype)


class _Lora(torch.autograd.Function):
    """Batched LoRA with one adapter per row; its backward pass adds gradients directly to the bank's buffer.

    The parameters' `.grad` would work too, but autograd would first build the gradient of all slots, row by row, and
    keep copies that this single formula does not need.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        onto: Tensor | None,
        down: Tensor,
        up: Tensor,
        slots: Tensor,
        absent: Tensor | None,
        scale: float,
        buffers: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        index = slots if absent is None else slots.clamp(min=0)
        own_down, own_up = _rows(down, index, x.dtype), _rows(up, index, x.dtype)
        if absent is not None:
            own_down.masked_fill_(absent, 0)
            own_up.masked_fill_(absent, 0)
        # Here and below, products of R rows and T tokens keep tokens last: 1/2 to 2/3 of the time on a CPU.
        middle = torch.bmm(own_down, x.mT)
        scaled = middle * scale
        if onto is None:
            out = torch.bmm(scaled.mT, own_up.mT)
        else:
            out = torch.baddbmm(onto.to(x.dtype), scaled.mT, own_up.mT).to(onto.dtype)
        ctx.scale, ctx.buffers, ctx.has_onto = scale, buffers, onto is not None
        ctx.save_for_backward(own_down, own_up, index, absent, *((x, scaled) if buffers is not None else ()))
        return middle.mT, out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        own_down, own_up, index, absent, *kept = ctx.saved_tensors
        by_out = upstream[1].to(own_down.dtype)
        by_middle = torch.bmm(own_up.mT, by_out.mT) * ctx.scale + upstream[0].mT
        if ctx.buffers is not None:
            x, scaled = kept
            _collect(ctx.buffers[0], index, absent, torch.bmm(by_middle, x))
            # Made contiguous while it is small: accumulating a strided tensor takes three times as long.
            _collect(ctx.buffers[1], index, absent, torch.bmm(scaled, by_out).mT.contiguous())
        by_x = torch.bmm(by_middle.mT, own_down) if ctx.needs_input_grad[0] else None
        return by_x, upstream[1] if ctx.has_onto else None, None, None, None, None, None, None


def _rows(view: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of `view[index]` in `dtype`; casts before or after indexing, whichever casts fewer values."""
    if view.shape[0] <= index.shape[0]:
        return view.to(dtype).index_select(0, index)
    return view.index_select(0, index).to(dtype)


def _collect(buffer: Tensor, index: Tensor, absent: Tensor | None, gradient: Tensor) -> None:
    """Add each row's gradient to its slot's gradient; rows without a slot add zero, even if theirs is not finite."""
    gradient = gradient.to(buffer.dtype)
    if absent is not None:
        gradient = gradient.masked_fill(absent, 0)
    if buffer.device.type == "cpu":
        buffer.index_add_(0, index, gradient)
    else:
        # On a GPU, index_add_ accumulates in no fixed order, so results would not be reproducible.
        buffer.index_put_((index,), gradient, accumulate=True)


class _Take(torch.autograd.Function):
    """`view[slots]`, whose backward pass adds the gradient directly to the bank's buffer."""

    @staticmethod
    def forward(ctx: Any, view: Tensor, gradient: Tensor, slots: Tensor) -> Tensor:
        ctx.gradient = gradient
        ctx.save_for_backward(slots)
        return view[slots]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, None, None]:
        (slots,) = ctx.saved_tensors
        ctx.gradient.index_put_((slots,), upstream[0].to(ctx.gradient.dtype), accumulate=True)
        return None, None, None
