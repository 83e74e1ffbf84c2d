"""Number of experts from the data (`groups.experts: auto`): the number of clusters of users.

Stage 2 is first trained with more experts than are needed. The gates depend on a user only through the scores W_u e_u:
two users with equal scores in all modules have the same mixture of experts for every token. Users who answer alike get
similar scores, so their clusters are counted, by k-means for every number k and the mean silhouette (Rousseeuw 1987):
the smallest k whose mean is within one standard error, paired over users, of the highest. For one user, with the mean
distance a to the users of the same cluster and b to those of the nearest other one, the silhouette is
(b - a) / max(a, b): 1 if clusters are far apart, 0 if they touch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from proper.config import Config, GroupsConfig
from proper.files import write_json
from proper.json_records import read_record
from proper.models.checkpoints import with_experts
from proper.models.personal import ProperModel

FloatArray = NDArray[np.float64]

logger = logging.getLogger(__name__)
MIN_SILHOUETTE = 0.25
"""Mean silhouette up to which Kaufman & Rousseeuw (1990) speak of no substantial structure."""


@dataclass(frozen=True)
class ExpertCount:
    """The number of experts, why, and the mean silhouette by number of clusters."""

    experts: int
    reason: str
    silhouettes: dict[int, float]


@torch.no_grad()
def user_scores(model: ProperModel, embeddings: Float[Tensor, "U D"]) -> Float[Tensor, "U K"]:
    """Return every user's scores W_u e_u of all modules, K = modules x experts, fp32 on the CPU.

    Without each module's mean over the experts, which no softmax sees.
    """
    found = []
    for layer in model.layers.values():
        if layer.router is not None:
            weights = layer.router.user.cpu()
            found.append(embeddings[:, layer.router.span] @ (weights - weights.mean(0)).mT)
    return torch.cat(found, 1)


def count_experts(scores: Float[Tensor, "U K"], most: int, default: int) -> ExpertCount:
    """Return the number of clusters of users by their scores: at least 2, at most `most` and a third of the users.

    Returns:
        The `default` if there are too few users or the silhouettes show no substantial structure.
    """
    # Not at the top: scikit-learn takes 1.5 s to import.
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_samples

    own: dict[int, FloatArray] = {}
    points = scores.double().numpy()
    distinct = len(np.unique(points, axis=0))
    for number in range(2, min(most, distinct, len(points) // 3) + 1):
        clusters = KMeans(n_clusters=number, n_init=10, random_state=0).fit_predict(points)
        own[number] = silhouette_samples(points, clusters)
    found = {number: round(float(values.mean()), 4) for number, values in own.items()}
    best = max(found, key=lambda number: found[number], default=default)
    if not found:
        return ExpertCount(default, f"{distinct} different users are too few to count clusters; the default", found)
    if found[best] <= MIN_SILHOUETTE:
        why = f"no number of clusters has a silhouette above {MIN_SILHOUETTE} (highest: {found[best]:.2f}); the default"
        return ExpertCount(default, why, found)
    fewest = next(number for number, values in own.items() if _as_good(values, own[best]))
    why = f"the {len(points)} users form {fewest} clusters (silhouette {found[fewest]:.2f}, highest {found[best]:.2f})"
    return ExpertCount(fewest, why, found)


def _as_good(values: FloatArray, best: FloatArray) -> bool:
    """Return whether the users' silhouettes are at most one standard error of the mean difference below the best."""
    lost = best - values
    return bool(lost.mean() <= lost.std(ddof=1) / len(lost) ** 0.5)


def find_experts(
    config: Config, path: Path, scores: Callable[[], Float[Tensor, "U K"]], accelerator: Accelerator
) -> Config:
    """Return a config with the number of experts in the JSON file `path`; without the file, find the number first.

    Args:
        config: the settings, with `groups.experts: auto`.
        path: where the number and the reason are kept, so that a resumed run has the same.
        scores: trains stage 2 and returns `user_scores`.
        accelerator: the processes, which all call this.
    """
    if not path.exists():
        most = config.groups.expert_count
        logger.info(f"groups.experts: auto: stage 2 is first trained with {most} experts")
        found = count_experts(scores(), most, GroupsConfig().expert_count)
        if accelerator.is_main_process:
            write_json(path, asdict(found))
        accelerator.wait_for_everyone()
    count = read_record(path, experts=int, reason=str)
    logger.info(f"groups.experts: auto: {count['experts']} experts, since {count['reason']}")
    return with_experts(config, count["experts"])
