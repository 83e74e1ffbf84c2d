"""Routers of the mixture of LoRA experts: the user-aware router (stage 2) and the LoRA-aware router (stage 3b).

Scores are fp32 (fp64 for fp64 inputs); the gates are their softmax over the experts. Training in short
loops: `recipes/stage2_groups.py` and `recipes/stage3b_router.py`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from proper.layers.experts import tokens_last

RouterForm = Literal["default", "released"]


class UserAwareRouter(nn.Module):
    """User-aware router of stage 2: `w = softmax(W_x x + W_u e_u)`, per token.

    `form="released"` is the formula of the authors' code, `softmax(softmax(W_x x) + softmax(W_u e_u)) / E`: the scores
    lie between 0 and 2, so before the factor 1/E no weight can exceed e^2 / (e^2 + E - 1), .649 at E = 5.

    With several tasks, the user's scores are `W_u e_u + W_t[:, task]`. With `separate`, W_t starts where it leaves
    expert i to task i mod K alone, and no gradient leads away: a control in which tasks share no expert.

    Attributes:
        factor: factor of the mixture: 1, or 1/E in the released form.
        token: W_x (E, I).
        user: W_u (E, D).
        task: W_t (E, K), one column per task; None with one task.
        span: this module's part of the embedding; all of it unless every module has its own table.
    """

    def __init__(
        self,
        inputs: int,
        embedding: int,
        experts: int,
        *,
        form: RouterForm = "default",
        offset: int = 0,
        tasks: int = 0,
        separate: bool = False,
    ) -> None:
        super().__init__()
        self.form = form
        self.factor = 1 / experts if form == "released" else 1.0
        self.span = slice(offset, offset + embedding)
        self.token = nn.Parameter(_uniform(experts, inputs))
        self.user = nn.Parameter(_uniform(experts, embedding))
        self.task: nn.Parameter | None = None
        if tasks:
            self.task = nn.Parameter(_separate(experts, tasks) if separate else _uniform(experts, tasks))

    def scores(
        self, x: Float[Tensor, "B T I"], embedding: Float[Tensor, "B D"], tasks: Int[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B T E"]:
        """Return the scores whose softmax gives the gates, fp32; `tasks` are the rows' tasks, from 0."""
        return self.scores_of(tokens_last(self.token, x), embedding, tasks)

    def scores_of(
        self, by_token: Float[Tensor, "E B T"], embedding: Float[Tensor, "B D"], tasks: Int[Tensor, "B"] | None = None
    ) -> Float[Tensor, "B T E"]:
        """Return the scores from a precomputed W_x x."""
        by_user = functional.linear(self.user, embedding[:, self.span].to(self.user.dtype)).unsqueeze(2)
        if self.task is not None:
            if tasks is None:
                raise RuntimeError("a router of several tasks needs the task of every row")
            by_user = by_user + self.task[:, tasks].unsqueeze(2)
        by_token = at_least_fp32(by_token)
        if self.form == "released":
            return (by_token.softmax(0) + by_user.softmax(0)).permute(1, 2, 0)
        return (by_token + by_user).permute(1, 2, 0)


def gates_of(scores: Float[Tensor, "B T E"]) -> Float[Tensor, "B T E"]:
    """Return the gates: the softmax over the experts, which are the outermost dimension in memory."""
    return scores.permute(2, 0, 1).softmax(0).permute(1, 2, 0)


class LoraAwareRouter(nn.Module):
    """LoRA-aware router of 3b: `softmax(W_r h_u)` or `softmax(logits of stage 2 + W_r h_u)`, h_u = s_u B_u A_u x.

    `W_r h_u = (s_u W_r B_u)(A_u x)`: with the small matrices M_u = s_u W_r B_u (E, R) a token costs E*R.

    Normalized, the input is h_u / c_u with c_u = s_u |B_u A_u|_F / sqrt(O), the root mean square of h_u where the
    features of x are independent with variance 1, so that the inputs of all users have the same scale.

    Attributes:
        weight: W_r (E, O), zero at the start, shared by all users.
        normalized: whether the input is normalized.
    """

    def __init__(self, outputs: int, experts: int, normalized: bool = False) -> None:
        super().__init__()
        self.normalized = normalized
        self.weight = nn.Parameter(torch.zeros(experts, outputs))

    def matrices(
        self, up: Float[Tensor, "S O R"], scale: float, down: Float[Tensor, "S R I"] | None = None
    ) -> Float[Tensor, "S E R"]:
        """Return M_u for every slot, fp32; a normalized input needs A_u too."""
        found = torch.einsum("eo,sor->ser", self.weight, up.to(self.weight.dtype))
        return self._scaled(found, up.mT, scale, down)

    def matrices_of(
        self, turned: Float[Tensor, "S R O"], scale: float, down: Float[Tensor, "S R I"] | None = None
    ) -> Float[Tensor, "S E R"]:
        """Return M_u from transposed B_u in one matrix product, without copying."""
        flat = torch.mm(turned.to(self.weight.dtype).flatten(0, 1), self.weight.t())
        return self._scaled(flat.view(*turned.shape[:2], -1).mT, turned, scale, down)

    def _scaled(
        self, found: Float[Tensor, "S E R"], turned: Float[Tensor, "S R O"], scale: float, down: Tensor | None
    ) -> Float[Tensor, "S E R"]:
        """Return W_r B_u times s_u, or times s_u / c_u, in which s_u cancels."""
        if not self.normalized:
            return scale * found
        assert down is not None
        inner, outer = (part.to(found.dtype) @ part.to(found.dtype).mT for part in (down, turned))
        size = (inner * outer).sum((-2, -1)) / turned.shape[-1]
        return found * size.clamp(min=1e-12).rsqrt()[:, None, None]


def at_least_fp32(x: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Return `x` in fp32, or unchanged if it is fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


MASKED = -1e3
"""Score that leaves an expert a gate of exactly 0; finite, since stored tensors must be."""


def _separate(experts: int, tasks: int) -> Float[Tensor, "E K"]:
    """Return W_t that gives expert i to task i mod K alone."""
    own = torch.arange(experts)[:, None] % tasks == torch.arange(tasks)
    return torch.zeros(experts, tasks).masked_fill(~own, MASKED)


def _uniform(rows: int, columns: int) -> Tensor:
    bound = 1 / math.sqrt(columns)
    return torch.empty(rows, columns).uniform_(-bound, bound)
