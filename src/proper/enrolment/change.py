"""Test whether a version is outdated for its user: a sequential likelihood ratio against an unknown user.

Let l_i be an interaction's summed answer loss in nats under the version in service, and m_i that under the group model
of an unknown user. Then l_i - m_i is the evidence that the answers are those of another user, as a log likelihood
ratio, and Page's statistic over the new interactions, in the order of arrival, is

    S_i = max(0, S_(i-1) + clip(l_i - m_i, -c, c))

The habits have changed if the last S is at least `EVIDENCE`, since the interaction after the last at which S was 0. The
clip `CLIP` limits the evidence of one interaction, which may be an outlier. Drift is measured against the user's
usual loss; this test compares with the model of an unknown user instead, and needs no data of other users.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

EVIDENCE = 3.0
"""Nats from which on the habits have changed: a likelihood ratio of 20."""
CLIP = 2.0
"""Most nats of one interaction, for or against."""


def change_point(served: Float[Tensor, "n"], unknown: Float[Tensor, "n"]) -> int | None:
    """Return the index of the first interaction since the user's habits changed; None if they did not (see the module).

    Args:
        served: summed answer losses of the new interactions under the version in service, in nats.
        unknown: the same under the group model of an unknown user.
    """
    score, begun = 0.0, 0
    for at, each in enumerate((served - unknown).clamp(-CLIP, CLIP).tolist()):
        score = score + each
        if not score > 0:
            score, begun = 0.0, at + 1
    return begun if score >= EVIDENCE else None
