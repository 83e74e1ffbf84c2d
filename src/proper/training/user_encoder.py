"""Training of the user encoder (`models.user_encoder`) at the end of stage 2, on the users of that stage.

    1. features    one forward pass of the population model over stage 2's rows, at most `MAX_ITEMS` of them
    2. phi         principal components of the features, and the variances for the pooling
    3. readout     ridge regression and a two-layer network from z of random subsets of a user's items (`SIZES`, and
                   all) to the change that training made to the user's embedding
    4. choice      on users held out from 2 and 3: the penalty, and the network's steps, by the error of W_u e; then the
                   mean embedding, ridge or network, times one of `GAINS`, by the answer loss on further items
    5. the chosen one is fitted again on all users

A trained embedding is its random start plus the change by training, and the start has no information about the user.
Training may also scale the start, so the targets are the residuals of the embeddings after a regression on the starts,

    target_u = e_u - e_mean - r s_u,        r = sum_u <C (e_u - e_mean), C s_u> / sum_u |C s_u|^2

with C the matrix from an embedding to the routers' scores (`effect_of`). On 120 users of the demo, r was 1.2, and the
planted groups explained .35 of the targets' variance, but .17 of that of the embeddings.
"""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor, nn

from proper.console import progress
from proper.data.batching import by_length, collate
from proper.data.dataset import SampledRows
from proper.data.encoder import EncodedExample, Encoder
from proper.layers.batch_context import RowContext
from proper.models.item_features import item_features
from proper.models.personal import ProperModel
from proper.models.user_encoder import ItemProjection, Pooling, Readout, UserEncoder, parts_of
from proper.training.checkpoint import seed_of

logger = logging.getLogger(__name__)

MAX_ITEMS = 20_000
"""Rows whose features are computed."""
PCA_ROWS = 2_048
"""Rows from whose features the principal components are taken; only these are in memory at once."""
COMPONENTS = 16, 32, 12
"""Principal components of surprise, answer and context."""
SIZES = (1, 1, 2, 2, 5, 5, 10)
"""Sizes of the random subsets of a user's items, beside all of them."""
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Ridge penalties, as a share of the number of rows."""
HIDDEN, STEPS, CHECKED = 32, 200, 5
"""Hidden units of the network, its largest number of steps, and the steps between two measurements."""
GAINS = 1.0, 2.0, 4.0
"""Factors on the placed embeddings' distance from the mean: a regression from few items shrinks it."""
HELD_OUT, MAX_HELD_OUT = 0.2, 64
"""Share and largest number of users held out for the choice."""
PLACED_FROM, ASKED = (2, 5), 4
"""The choice's answer loss: embeddings from so many items, on so many others of the user."""
MIN_USERS = 16
"""Below this number of users with more items than `PLACED_FROM[0]`, which can be held out, there is no encoder."""


@dataclass(frozen=True)
class UserItems:
    """The items of one user of stage 2, their phi, and the change of the user's embedding by training."""

    items: list[EncodedExample]
    phi: Float[Tensor, "n K"]
    added: Float[Tensor, "D"]


def train_encoder(
    model: ProperModel,
    encoder: Encoder,
    sample: SampledRows,
    users: Sequence[str],
    embeddings: Float[Tensor, "U D"],
    starts: Float[Tensor, "U D"],
    seed: int,
) -> UserEncoder | None:
    """Return an encoder for a trained stage 2; None if there are too few users, or if the mean embedding does better.

    Args:
        model: the model with the trained experts and routers.
        encoder: the tokenizer.
        sample: the rows that stage 2 trained on.
        users: its users.
        embeddings: their trained embeddings.
        starts: their embeddings before training.
        seed: the run's seed.
    """
    rows = list(islice(sample.rows(0), MAX_ITEMS))
    enough = sum(n > PLACED_FROM[0] for n in Counter(row.user for row in rows).values())
    if enough < MIN_USERS:
        who = f"{enough} users with more than {PLACED_FROM[0]} rows"
        logger.info(f"no encoder of users: stage 2 trained {who}, and it takes {MIN_USERS}")
        return None
    items = [encoder.encode(row) for row in rows]
    projection, phi = _features(model, items)
    index, own = {user: at for at, user in enumerate(users)}, dict[str, list[int]]()
    for at, item in enumerate(items):
        own.setdefault(item.user, []).append(at)
    effect, mean = effect_of(model), embeddings.mean(0)
    added = without_starts(embeddings - mean, starts, [index[user] for user in own], effect)
    known = [UserItems([items[at] for at in ats], phi[ats], added[index[user]]) for user, ats in own.items()]
    rng = random.Random(seed_of(seed, "encoder"))
    rng.shuffle(known)
    known.sort(key=lambda user: len(user.items) <= PLACED_FROM[0])  # those who can be held out first, in random order
    held = min(MAX_HELD_OUT, max(4, round(HELD_OUT * len(known))), enough // 2)
    fit = Regression.of(known[held:], effect, rng)
    test = Regression.of(known[:held], effect, rng, fit.pooling)
    penalty = min(PENALTIES, key=lambda each: test.error(fit.ridge(each)))
    network, steps, _ = fit.network(seed, test)
    candidates = {("mean", 0.0): zero_readout(phi.shape[1], len(mean))}
    for gain in GAINS:
        candidates |= {("ridge", gain): fit.ridge(penalty).times(gain), ("network", gain): network.times(gain)}
    losses = {
        key: _answer_loss(model, known[:held], UserEncoder(projection, fit.pooling, readout, mean, {}))
        for key, readout in candidates.items()
    }
    kind, gain = best = min(losses, key=lambda key: losses[key])
    rounded = {f"{kind} x {gain:g}" if gain else kind: round(loss, 6) for (kind, gain), loss in losses.items()}
    metadata = {"kind": kind, "gain": gain, "losses": rounded, "penalty": penalty, "steps": steps}
    metadata |= {"users": len(known), "held_out_users": held, "items": len(items)}
    text = ", ".join(f"{name} {loss:.4f}" for name, loss in rounded.items())
    logger.info(f"encoder of users: {kind}; answer loss on held-out users: {text}")
    if best == ("mean", 0.0):
        return None
    final = Regression.of(known, effect, rng)
    readout = final.ridge(penalty) if kind == "ridge" else final.network(seed, None, steps)[0]
    return UserEncoder(projection, final.pooling, readout.times(gain), mean, metadata)


def zero_readout(width: int, size: int) -> Readout:
    """Return the readout that places all users at the mean."""
    return Readout(torch.zeros(size, width), torch.empty(0), torch.empty(size, 0))


def without_starts(
    embeddings: Float[Tensor, "U D"],
    starts: Float[Tensor, "U D"],
    trained: Sequence[int],
    effect: Float[Tensor, "J D"],
) -> Float[Tensor, "U D"]:
    """Return centred embeddings without their random starts, by a regression on the `trained` users."""
    seen, start = embeddings[trained] @ effect.T, starts[trained] @ effect.T
    left = (seen * start).sum() / start.square().sum().clamp(min=1e-12)
    return embeddings - left * starts


def effect_of(model: ProperModel) -> Float[Tensor, "N D"]:
    """Return the matrix from an embedding to the scores in the routers' softmax: all W_u, minus their mean expert."""
    rows = []
    for layer in model.layers.values():
        if layer.router is not None:
            user = layer.router.user.detach().float().cpu()
            full = torch.zeros(len(user), model.embedding_size)
            full[:, layer.router.span] = user - user.mean(0)
            rows.append(full)
    return torch.cat(rows)


def _features(model: ProperModel, items: Sequence[EncodedExample]) -> tuple[ItemProjection, Float[Tensor, "N K"]]:
    """Return the projection, from the first items, and phi of all items."""
    found: list[Tensor] = []
    with progress("encoder of users: features", len(items)) as advance:
        first = item_features(model, items[:PCA_ROWS], advance)
        projection = project(first)
        found.append(projection(first))
        for at in range(PCA_ROWS, len(items), PCA_ROWS):
            found.append(projection(item_features(model, items[at : at + PCA_ROWS], advance)))
    return projection, torch.cat(found)


def project(features: Float[Tensor, "N F"]) -> ItemProjection:
    """Return the leading principal components of each part of the features, scaled to unit variance."""
    mean = features.mean(0)
    context, answer, surprise = parts_of(features - mean)
    directions = (_components(part, n) for part, n in zip((surprise, answer, context), COMPONENTS, strict=True))
    return ItemProjection(mean, *directions)


def _components(part: Float[Tensor, "N F"], count: int) -> Float[Tensor, "J K"]:
    _, sizes, directions = torch.linalg.svd(part.double(), full_matrices=False)
    kept = [at for at in range(min(count, len(sizes))) if sizes[at] > 1e-4 * sizes[0]]
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
        z: (N, K). target: (N, D), see the module. effect: see `effect_of`.
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
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
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


@torch.no_grad()
def _answer_loss(model: ProperModel, users: Sequence[UserItems], encoder: UserEncoder) -> float:
    """Return the mean answer loss per token on items of these users that their embeddings were not placed from."""
    work: list[tuple[EncodedExample, Tensor]] = []
    for user in users:
        for size in PLACED_FROM:
            asked = user.items[size : size + ASKED]
            if asked:
                placed = encoder.place([user.phi[:size]])[0]
                work += [(item, placed) for item in asked]
    return _mean_loss(model, work)


def _mean_loss(model: ProperModel, work: Sequence[tuple[EncodedExample, Tensor]]) -> float:
    total = tokens = 0.0
    for chunk in by_length([len(item.ids) for item, _ in work], 32, model.backbone.batch_tokens):
        batch = collate([work[at][0] for at in chunk], model.backbone.pad_id, model.device)
        embedding = torch.stack([work[at][1] for at in chunk]).to(model.device)
        sums, counts = model.answer_losses(batch, RowContext("groups", embedding=embedding))
        total, tokens = total + float(sums.sum()), tokens + float(counts.sum())
    return total / tokens if tokens and math.isfinite(total) else math.inf
