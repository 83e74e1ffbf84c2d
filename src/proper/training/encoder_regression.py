"""Regression of users' embeddings on their items, for the user encoder: steps 2 and 3 of `training.user_encoder`."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from proper.data.encoder import EncodedExample
from proper.models.user_encoder import ItemProjection, Pooling, Readout, parts_of
from proper.training.checkpoint import seed_of

COMPONENTS = 16, 32, 12
"""Principal components of surprise, answer and context."""
SIZES = (1, 1, 2, 2, 5, 5, 10)
"""Sizes of the random subsets of a user's items, beside all of them."""
NEGLIGIBLE = 1e-4
"""Share of the largest singular value up to which a component counts as rounding."""
HIDDEN, STEPS, CHECKED = 32, 200, 5
"""Hidden units of the network, its largest number of steps, and the steps between two measurements."""
RATE, DECAY = 1e-2, 0.1
"""Learning rate and weight decay of the network."""


@dataclass(frozen=True)
class UserItems:
    """The items of one user of stage 2, their phi, and the change of the user's embedding by training."""

    items: list[EncodedExample]
    phi: Float[Tensor, "n K"]
    added: Float[Tensor, "D"]


def project(features: Float[Tensor, "N F"]) -> ItemProjection:
    """Return the leading principal components of each part of the features, scaled to unit variance."""
    mean = features.mean(0)
    context, answer, surprise = parts_of(features - mean)
    directions = (_components(part, n) for part, n in zip((surprise, answer, context), COMPONENTS, strict=True))
    return ItemProjection(mean, *directions)


def _components(part: Float[Tensor, "N F"], count: int) -> Float[Tensor, "J K"]:
    _, sizes, directions = torch.linalg.svd(part.double(), full_matrices=False)
    kept = [at for at in range(min(count, len(sizes))) if sizes[at] > NEGLIGIBLE * sizes[0]]
    scaled: Tensor = directions[kept] / sizes[kept].unsqueeze(1) * math.sqrt(len(part))
    return scaled.T.float().contiguous()


def pool(users: Sequence[Float[Tensor, "n K"]]) -> Pooling:
    """Return the users' mean phi, and the variances between users and within a user, by the method of moments."""
    sizes = torch.tensor([len(own) for own in users], dtype=torch.float64)
    means = torch.stack([own.double().mean(0) for own in users])
    center = means.mean(0)
    within = torch.stack([(own.double() - mean).square().sum(0) for own, mean in zip(users, means, strict=True)]).sum(0)
    within = within / (sizes - 1).sum().clamp(min=1)
    between = (means.var(0) - within * (1 / sizes).mean()).clamp(min=0)
    return Pooling(center.float(), between.float(), within.float())


@dataclass(frozen=True)
class Regression:
    """Pooled subsets of users' items and the users' embeddings, as rows of a regression.

    Attributes:
        z: the pooled subsets, (N, K).
        target: the change of the embedding of each subset's user by training, (N, D).
        effect: `user_encoder.effect_of`, (J, D).
    """

    pooling: Pooling
    z: Float[Tensor, "N K"]
    target: Float[Tensor, "N D"]
    effect: Float[Tensor, "J D"]

    @classmethod
    def of(
        cls,
        users: Sequence[UserItems],
        effect: Float[Tensor, "J D"],
        rng: random.Random,
        pooling: Pooling | None = None,
    ) -> Regression:
        """Draw subsets of every user's items; `pooling` None takes that of these users."""
        pooling = pooling or pool([user.phi for user in users])
        means, counts, target = [], [], []
        for user in users:
            for size in (*SIZES, len(user.items)):
                if size <= len(user.items):
                    means.append(user.phi[rng.sample(range(len(user.items)), size)].mean(0))
                    counts.append(float(size))
                    target.append(user.added)
        return cls(pooling, pooling(torch.stack(means), torch.tensor(counts)), torch.stack(target), effect)

    def ridge(self, penalty: float) -> Readout:
        """Return the ridge regression of the embeddings on z."""
        z, target = self.z.double(), self.target.double()
        gram = z.T @ z + penalty * len(z) * torch.eye(z.shape[1], dtype=torch.float64)
        weight = torch.linalg.solve(gram, z.T @ target).T.float().contiguous()
        return Readout(weight, torch.empty(0), torch.empty(len(weight), 0))

    def error(self, readout: Readout) -> float:
        """Return the mean squared error of the routers' logits."""
        return float(((readout(self.z) - self.target) @ self.effect.T).square().mean())

    def network(self, seed: int, test: Regression | None, steps: int = STEPS) -> tuple[Readout, int, float]:
        """Return a network, its steps and its error on `test`: that with the least error, or after all steps."""
        draw = torch.Generator().manual_seed(seed_of(seed, "encoder network"))
        width, size = self.z.shape[1], self.target.shape[1]
        first = torch.randn(HIDDEN, width, generator=draw) / math.sqrt(width)
        shapes = first, torch.zeros(HIDDEN), torch.zeros(size, HIDDEN)
        parameters = [nn.Parameter(each) for each in shapes]
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY)
        best: tuple[Readout, int, float] | None = None
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            guess = torch.tanh(self.z @ parameters[0].T + parameters[1]) @ parameters[2].T
            loss = ((guess - self.target) @ self.effect.T).square().mean()
            torch.autograd.backward(loss)
            optimizer.step()
            if step == steps or (test is not None and step % CHECKED == 0):
                now = Readout(*(each.detach().clone() for each in parameters))
                error = 0.0 if test is None else test.error(now)
                if best is None or error < best[2]:
                    best = now, step, error
        assert best is not None
        return best


def zero_readout(width: int, size: int) -> Readout:
    """Return the readout that places all users at the mean."""
    return Readout(torch.zeros(size, width), torch.empty(0), torch.empty(size, 0))
