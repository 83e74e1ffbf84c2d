"""Expert routing analysis: entropy, mutual information, expert load and a 2-D map of users, from users' mean gates.

Gates come in as one array, averaged over each user's tokens. Shapes: U users, M adapted modules, E experts, D embedding
size. Entropies are in nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from proper.errors import DataError
from proper.evaluation.metrics import FloatArray

IntArray = NDArray[np.int64]

_ROUNDING = 1e-2
"""Largest deviation from 1 of the sum of a user's gates, which may be bf16."""


def analyze_routing(
    gates: ArrayLike,
    users: Sequence[str],
    embeddings: ArrayLike,
    histories: Mapping[str, int],
    groups: Mapping[str, int] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the routing figures for `results.json`, and one row per user for `routing.json`.

    `entropy` is that of users' mean gates, which is never smaller than the mean entropy of single tokens' gates.

    Args:
        gates: `(U, M, E)`, each user's mean gate over their tokens; every row sums to 1.
        users: the U ids, in the order of `gates`.
        embeddings: `(U, D)`, or `(U, M, D)` if every module has its own table.
        histories: history length by user.
        groups: the true group of each user, if it is known (demo data).

    Raises:
        DataError: shapes do not match, a gate is not finite, or rows do not sum to 1.
    """
    mean_gates = _checked(gates, users)
    points = np.asarray(embeddings, dtype=np.float64).reshape(len(users), -1)
    results: dict[str, Any] = {
        "experts": mean_gates.shape[2],
        "utilization": [float(share) for share in mean_gates.mean(axis=(0, 1))],
        "entropy": float(_entropy(mean_gates).mean()),
        "user_expert_mutual_information": mutual_information(mean_gates),
        "constraint_cosine": constraint_cosine(mean_gates),
    }
    if groups is not None:
        results["nmi"] = group_nmi(mean_gates, users, groups)
    (map_, map_share), (gate_map, gate_share) = project(points), project(mean_gates.reshape(len(users), -1))
    rows = _user_rows(mean_gates, users, histories, groups, np.concatenate([map_, gate_map], axis=1))
    explained = {"embeddings": map_share, "gates": gate_share}
    return results, {**results, "modules": mean_gates.shape[1], "explained_variance": explained, "users": rows}


def _user_rows(
    gates: FloatArray,
    users: Sequence[str],
    histories: Mapping[str, int],
    groups: Mapping[str, int] | None,
    maps: FloatArray,
) -> list[dict[str, Any]]:
    """Return one row per user; `maps (U, 4)` are 2-D coordinates by embedding and by gates."""
    by_expert, main = gates.mean(axis=1), main_experts(gates)
    return [
        {
            "user": user,
            "history": int(histories.get(user, 0)),
            "gates": [float(share) for share in by_expert[index]],
            "main": int(main[index]),
            **{name: float(at) for name, at in zip(("x", "y", "gate_x", "gate_y"), maps[index], strict=True)},
            "group": None if groups is None else groups.get(user),
        }
        for index, user in enumerate(users)
    ]


def mutual_information(gates: FloatArray) -> float:
    """Return the mutual information of user and expert, averaged over modules, in nats.

    The joint is `p(u, e) = m_u(e) / U` in each module, so this is the entropy of the average user less the average
    entropy of users: 0 if all users have the same mixture, at most `log(min(U, E))`.
    """
    together, apart = _entropy(gates.mean(axis=0)), _entropy(gates).mean(axis=0)
    return max(0.0, float((together - apart).mean()))


def constraint_cosine(gates: FloatArray) -> float | None:
    """Return the cosine between two users' mean gates, averaged over pairs of different users and over modules.

    The constraint loss lowers this figure. None with fewer than two users.
    """
    users = len(gates)
    if users < 2:
        return None
    units = gates / np.linalg.norm(gates, axis=2, keepdims=True)
    # The squared norm of the sum of unit vectors counts every pair twice and each vector with itself (1) once.
    pairs = (np.square(units.sum(axis=0)).sum(axis=1) - users) / (users * (users - 1))
    return min(1.0, float(pairs.mean()))


def task_routing(gates: Mapping[str, ArrayLike]) -> dict[str, Any]:
    """Return which experts serve which task, for `results.json`.

    Args:
        gates: by task, each user's mean gates `(U, M, E)` on items of the task.

    Returns:
        `tasks`, by name the mean gate of each expert; `task_expert_mutual_information`, in nats: 0 if all tasks use the
        experts equally.
    """
    means = {name: np.asarray(each, dtype=np.float64).mean(axis=0) for name, each in gates.items()}
    return {
        "tasks": {name: [float(share) for share in mean.mean(axis=0)] for name, mean in means.items()},
        "task_expert_mutual_information": mutual_information(np.stack(list(means.values()))),
    }


def group_nmi(gates: FloatArray, users: Sequence[str], groups: Mapping[str, int]) -> float | None:
    """Return the NMI (0 to 1) between k-means clusters of the concatenated mean gates and the true groups.

    k is the number of groups in `groups`; users without a true group are left out. None if no user has one.
    """
    known = [index for index, user in enumerate(users) if user in groups]
    if not known:
        return None
    # Not at the top: slow to import, as in `training.expert_count`.
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    points = gates.reshape(len(users), -1)[known]
    truth = [groups[users[index]] for index in known]
    clusters = min(len(set(groups.values())), len(np.unique(points, axis=0)))
    found = KMeans(n_clusters=clusters, n_init=50, random_state=0).fit_predict(points)
    return float(normalized_mutual_info_score(truth, found))


def main_experts(gates: FloatArray) -> IntArray:
    """Return each user's main expert, `(U,)`: the largest mean gate, averaged over modules.

    If that is the same expert for all users, the expert that deviates most from the average user instead.
    """
    shares = gates.mean(axis=1)
    largest = shares.argmax(axis=1)
    if len(shares) > 1 and (largest == largest[0]).all():
        largest = (shares / np.maximum(shares.mean(axis=0), 1e-12)).argmax(axis=1)
    return np.asarray(largest, dtype=np.int64)


def project(points: FloatArray) -> tuple[FloatArray, list[float]]:
    """Return the first two principal components of `(U, K)` points, `(U, 2)`, and their shares of the variance.

    Missing dimensions are 0. Signs are fixed (the largest coordinate is positive), so that maps are reproducible.
    """
    centred = points - points.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    found = (left * sizes)[:, :2]
    flat = np.zeros((len(points), 2))
    flat[:, : found.shape[1]] = found
    signs = np.sign(flat[np.abs(flat).argmax(axis=0), [0, 1]])
    variance = float(np.square(sizes).sum())
    shares = [float(size**2 / variance) if variance > 0 else 0.0 for size in sizes[:2]]
    return flat * np.where(signs == 0, 1.0, signs), [*shares, 0.0, 0.0][:2]


def _entropy(gates: FloatArray) -> FloatArray:
    return np.asarray(-(gates * np.log(np.maximum(gates, 1e-300))).sum(axis=-1))


def _checked(gates: ArrayLike, users: Sequence[str]) -> FloatArray:
    array = np.asarray(gates, dtype=np.float64)
    if array.ndim != 3 or array.shape[0] != len(users) or 0 in array.shape:
        raise DataError(f"gates must be (users, modules, experts) for {len(users)} users, not {array.shape}")
    wrong = ~np.isfinite(array).all(axis=(1, 2)) | (np.abs(array.sum(axis=2) - 1) > _ROUNDING).any(axis=1)
    if wrong.any():
        raise DataError(f"gates of user {users[int(wrong.argmax())]}: they do not sum to 1 in every module")
    # fp32 or bf16 sums deviate slightly from 1; the information figures need exactly 1.
    return np.asarray(array / array.sum(axis=2, keepdims=True))
