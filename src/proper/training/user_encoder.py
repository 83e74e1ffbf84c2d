"""Training of the user encoder (`models.user_encoder`) at the end of stage 2, on the users of that stage.

    1. features    one forward pass of the population model over stage 2's rows, at most `MAX_ITEMS` of them
    2. phi         principal components of the features, and the variances for the pooling
    3. readout     ridge regression and a two-layer network from z of random subsets of a user's items (`SIZES`, and
                   all) to the change that training made to the user's embedding
    4. choice      on users held out from 2 and 3: the penalty, and the network's steps, by the error of W_u e; then the
                   mean embedding, ridge or network, times one of `GAINS`, by the answer loss on further items
    5. the chosen one is fitted again on all users

The functions of 2 and 3 are in `encoder_regression`.

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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from proper.console import progress
from proper.data.batching import by_length, collate
from proper.data.encoder import EncodedExample, Encoder
from proper.data.histories import SampledRows
from proper.layers.batch_context import RowContext
from proper.models.item_features import item_features
from proper.models.personal import ProperModel
from proper.models.user_encoder import ItemProjection, Readout, UserEncoder
from proper.training.checkpoint import seed_of
from proper.training.encoder_regression import Regression, UserItems, project, zero_readout

logger = logging.getLogger(__name__)

MAX_ITEMS = 20_000
"""Rows whose features are computed."""
PCA_ROWS = 2_048
"""Rows from whose features the principal components are taken; only these are in memory at once."""
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Ridge penalties, as a share of the number of rows."""
GAINS = 1.0, 2.0, 4.0
"""Factors on the placed embeddings' distance from the mean: a regression from few items shrinks it."""
HELD_OUT, MIN_HELD_OUT, MAX_HELD_OUT = 0.2, 4, 64
"""Share of the users who are held out for the choice, and the limits of their number."""
PLACED_FROM, ASKED = (2, 5), 4
"""The choice's answer loss: embeddings from so many items, on so many others of the user."""
_BATCH = 32  # rows of a forward pass
MIN_USERS = 16
"""Below this number of users with more items than `PLACED_FROM[0]`, which can be held out, there is no encoder."""


@dataclass(frozen=True)
class TrainedEmbeddings:
    """The users of stage 2, with their embeddings before and after training."""

    users: Sequence[str]
    starts: Float[Tensor, "U D"]
    embeddings: Float[Tensor, "U D"]


def train_encoder(
    model: ProperModel, encoder: Encoder, sample: SampledRows, trained: TrainedEmbeddings, seed: int
) -> UserEncoder | None:
    """Return an encoder for a trained stage 2; None if there are too few users, or if the mean embedding does better.

    Args:
        model: the model with the trained experts and routers.
        encoder: the tokenizer.
        sample: the rows that stage 2 trained on.
        trained: its users.
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
    effect, mean = effect_of(model), trained.embeddings.mean(0)
    known = _user_items(items, phi, trained, effect)
    rng = random.Random(seed_of(seed, "encoder"))
    rng.shuffle(known)
    known.sort(key=lambda user: len(user.items) <= PLACED_FROM[0])  # those who can be held out first, in random order
    held = min(MAX_HELD_OUT, max(MIN_HELD_OUT, round(HELD_OUT * len(known))), enough // 2)
    fit = Regression.of(known[held:], effect, rng)
    test = Regression.of(known[:held], effect, rng, fit.pooling)

    def answer_loss(readout: Readout) -> float:
        return _answer_loss(model, known[:held], UserEncoder(projection, fit.pooling, readout, mean, {}))

    choice = _choose(fit, test, answer_loss, seed)
    if choice.kind == "mean":
        return None
    final = Regression.of(known, effect, rng)
    readout = final.ridge(choice.penalty) if choice.kind == "ridge" else final.network(seed, None, choice.steps)[0]
    metadata = {**asdict(choice), "users": len(known), "held_out_users": held, "items": len(items)}
    return UserEncoder(projection, final.pooling, readout.times(choice.gain), mean, metadata)


def _user_items(
    items: Sequence[EncodedExample],
    phi: Float[Tensor, "N K"],
    trained: TrainedEmbeddings,
    effect: Float[Tensor, "J D"],
) -> list[UserItems]:
    """Return the users who have items, with these and the change that training made to the user's embedding."""
    index, own = {user: at for at, user in enumerate(trained.users)}, dict[str, list[int]]()
    for at, item in enumerate(items):
        own.setdefault(item.user, []).append(at)
    centred = trained.embeddings - trained.embeddings.mean(0)
    added = without_starts(centred, trained.starts, [index[user] for user in own], effect)
    return [UserItems([items[at] for at in ats], phi[ats], added[index[user]]) for user, ats in own.items()]


@dataclass(frozen=True)
class EncoderChoice:
    """The readout with the lowest answer loss on held-out users: "mean" (no encoder), "ridge" or "network"."""

    kind: str
    gain: float
    losses: dict[str, float]
    penalty: float
    steps: int


def _choose(fit: Regression, test: Regression, answer_loss: Callable[[Readout], float], seed: int) -> EncoderChoice:
    """Choose the penalty and the network's steps by the error on `test`, then kind and gain by the answer loss."""
    penalty = min(PENALTIES, key=lambda each: test.error(fit.ridge(each)))
    network, steps, _ = fit.network(seed, test)
    candidates = {("mean", 0.0): zero_readout(fit.z.shape[1], fit.target.shape[1])}
    for gain in GAINS:
        candidates |= {("ridge", gain): fit.ridge(penalty).times(gain), ("network", gain): network.times(gain)}
    losses = {key: answer_loss(readout) for key, readout in candidates.items()}
    kind, gain = min(losses, key=lambda key: losses[key])
    rounded = {f"{kind} x {gain:g}" if gain else kind: round(loss, 6) for (kind, gain), loss in losses.items()}
    text = ", ".join(f"{name} {loss:.4f}" for name, loss in rounded.items())
    logger.info(f"encoder of users: {kind}; answer loss on held-out users: {text}")
    return EncoderChoice(kind, gain, rounded, penalty, steps)


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
    for chunk in by_length([len(item.ids) for item, _ in work], _BATCH, model.backbone.batch_tokens):
        batch = collate([work[at][0] for at in chunk], model.backbone.pad_id, model.device)
        embedding = torch.stack([work[at][1] for at in chunk]).to(model.device)
        sums, counts = model.answer_losses(batch, RowContext("groups", embedding=embedding))
        total, tokens = total + float(sums.sum()), tokens + float(counts.sum())
    return total / tokens if tokens and math.isfinite(total) else math.inf
