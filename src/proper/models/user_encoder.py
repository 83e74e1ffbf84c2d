"""User encoder: computes a user's embedding e_u from a few items, in one forward pass and without gradient.

An item's features (`item_features`, F numbers) become K numbers phi: the leading principal components s of the
surprise, a of the answer and c of the context, and the products s c^T, which describe how a user answers in which
context.
A user's n items are pooled by their mean, which is shrunk toward that of all users by empirical Bayes, feature by
feature: with the variance t^2 of users' true means and s^2 of an item's deviation from its user's mean,

    z = n t^2 / (n t^2 + s^2) * (mean of phi - m)
    e = e_mean + W z                    kind "ridge"
    e = e_mean + V tanh(W z + b)        kind "network"

With no item, z = 0 and e is the mean embedding. The parameters are trained once per run, on the users of stage 2
(`training.user_encoder`). Nothing in the file belongs to a single user.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from proper.errors import StoreError
from proper.models.checkpoints import load_sound_tensors, save_tensors, tensor_of
from proper.models.item_features import PARTS

Kind = Literal["ridge", "network"]


@dataclass(frozen=True)
class ItemProjection:
    """Principal components of items' features.

    Attributes:
        mean: mean of the features (F,).
        surprise, answer, context: directions, scaled to unit variance, one a column, (H, S), (H, A) and (2 H, C).
    """

    mean: Float[Tensor, "F"]
    surprise: Float[Tensor, "J K"]
    answer: Float[Tensor, "J K"]
    context: Float[Tensor, "J K"]

    def __call__(self, features: Float[Tensor, "N F"]) -> Float[Tensor, "N K"]:
        """Return phi of every item."""
        context, answer, surprise = parts_of(features - self.mean)
        s, a, c = surprise @ self.surprise, answer @ self.answer, context @ self.context
        return torch.cat([s, a, (s.unsqueeze(2) * c.unsqueeze(1)).flatten(1)], dim=1)


def parts_of(features: Float[Tensor, "N F"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return context (N, 2 H), answer (N, H) and surprise (N, H) of items' features."""
    mean, last, answer, surprise = features.chunk(len(PARTS), dim=1)
    return torch.cat([mean, last], dim=1), answer, surprise


@dataclass(frozen=True)
class Pooling:
    """Shrinkage of a mean over n items.

    Attributes:
        center: m (K,).
        between: t^2 (K,).
        within: s^2 (K,).
    """

    center: Float[Tensor, "K"]
    between: Float[Tensor, "K"]
    within: Float[Tensor, "K"]

    def __call__(self, means: Float[Tensor, "U K"], counts: Float[Tensor, "U"]) -> Float[Tensor, "U K"]:
        """Return z in units of the users' standard deviation; 0 for a feature in which users do not differ."""
        between = counts.unsqueeze(1) * self.between
        weight = between / (between + self.within).clamp(min=1e-12)
        scale = torch.where(self.between > 0, self.between.clamp(min=1e-12).rsqrt(), 0.0)
        return weight * scale * (means - self.center)


@dataclass(frozen=True)
class Readout:
    """The map from z to an embedding's distance from the mean embedding.

    Attributes:
        first: W, (D, K) of a ridge regression, else (N, K).
        bias: b (N,) of a network; empty for a ridge regression.
        second: V (D, N) of a network; empty for a ridge regression.
    """

    first: Float[Tensor, "N K"]
    bias: Float[Tensor, "M"]
    second: Float[Tensor, "D M"]

    @property
    def kind(self) -> Kind:
        """Which of the two it is."""
        return "network" if self.bias.numel() else "ridge"

    def times(self, factor: float) -> Readout:
        """Return the readout whose distances are `factor` times as large."""
        first = self.first * factor if self.kind == "ridge" else self.first
        return Readout(first, self.bias, self.second * factor)

    def __call__(self, z: Float[Tensor, "U K"]) -> Float[Tensor, "U D"]:
        """Return the embeddings' distances from the mean."""
        if self.kind == "ridge":
            return z @ self.first.T
        return torch.tanh(z @ self.first.T + self.bias) @ self.second.T


@dataclass(frozen=True)
class UserEncoder:
    """A trained encoder.

    Attributes:
        mean: the mean user embedding (D,), which a user without items gets.
        metadata: how it was chosen, as JSON.
    """

    projection: ItemProjection
    pooling: Pooling
    readout: Readout
    mean: Float[Tensor, "D"]
    metadata: dict[str, Any]

    def place(self, phi: Sequence[Float[Tensor, "n K"]]) -> Float[Tensor, "U D"]:
        """Return users' embeddings from phi of their items; the mean embedding for a user without items."""
        counts = torch.tensor([len(own) for own in phi], dtype=torch.float32)
        means = torch.stack([own.mean(0) if len(own) else self.pooling.center for own in phi])
        return self.mean + self.readout(self.pooling(means, counts))


_TENSORS = {"projection": ItemProjection, "pooling": Pooling, "readout": Readout}


def save_encoder(path: Path, encoder: UserEncoder) -> None:
    """Write an encoder to a safetensors file with JSON metadata, atomically."""
    tensors = {"mean": encoder.mean}
    for name, part in _TENSORS.items():
        own = getattr(encoder, name)
        tensors |= {f"{name}.{field.name}": getattr(own, field.name) for field in fields(part)}
    save_tensors(path, tensors, encoder.metadata)


def load_encoder(path: Path) -> UserEncoder | None:
    """Return the encoder of a run; None if it has none, as older runs and runs in which the mean placed users better.

    Raises:
        ProperError: the file is damaged.
        StoreError: it has values that are not finite or absurdly large, or a tensor is missing or has a wrong shape.
    """
    if not path.exists():
        return None
    tensors, metadata = load_sound_tensors(path)
    projection, pooling, readout = (
        part(**{field.name: tensor_of(tensors, f"{name}.{field.name}", path) for field in fields(part)})
        for name, part in _TENSORS.items()
    )
    encoder = UserEncoder(projection, pooling, readout, tensor_of(tensors, "mean", path), metadata)
    flat = next((name for name, tensor in tensors.items() if not tensor.dim()), None)
    if flat is not None:
        raise StoreError(f"{path}: the tensor '{flat}' has the shape []")
    for name, shape in _shapes(encoder).items():
        if tensors[name].shape != shape:
            raise StoreError(
                f"{path}: the tensor '{name}' has the shape {list(tensors[name].shape)}, not {list(shape)}"
            )
    return encoder


def _shapes(encoder: UserEncoder) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the tensors must have, from the sizes of some of them."""
    projection, readout = encoder.projection, encoder.readout
    width = len(projection.mean) // len(PARTS)
    surprise, answer, context = (
        part.shape[-1] for part in (projection.surprise, projection.answer, projection.context)
    )
    size, features = len(encoder.mean), surprise + answer + surprise * context
    network = readout.kind == "network"
    hidden = len(readout.bias)
    return {
        "projection.surprise": (width, surprise),
        "projection.answer": (width, answer),
        "projection.context": (2 * width, context),
        **dict.fromkeys(("pooling.center", "pooling.between", "pooling.within"), (features,)),
        "readout.first": (hidden if network else size, features),
        "readout.second": (size, hidden) if network else tuple(readout.second.shape),
    }
