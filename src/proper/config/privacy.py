"""Settings of differentially private training of stages 1 and 2, and the defaults that differ with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from proper.config.section import Count, Positive, Section


class PrivacyConfig(Section):
    """User-level DP-SGD of stages 1 and 2: users' clipped gradients and noise; off unless one of the first two is set.

    It trains all steps of stage 1, without the constraint on pairs of users, and no encoder of new users, since these
    would use users' rows without noise: `population.patience` is 0, `groups.constraint.kind` is `none` and
    `groups.user_encoder` is false unless the config says otherwise, which is refused. `batch_size`,
    `gradient_accumulation` and `clip` of the two stages are not used. Needs the extra `privacy`.

    Attributes:
        epsilon: privacy loss of stages 1 and 2 together; the noise follows from it.
        noise_multiplier: standard deviation of the noise on the sum of users' gradients, as a multiple of `clip`;
            epsilon follows from it.
        delta: probability with which the privacy loss may exceed epsilon; to be well below 1 / users.
        clip: largest norm of one user's gradient.
        users_per_step: mean number of users in a step; every user is drawn independently of all others.
        rows_per_user: maximum number of rows of a user in a step, drawn from the user's rows.
    """

    epsilon: Positive | None = None
    noise_multiplier: Positive | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    clip: Positive = 1.0
    users_per_step: Count = 32
    rows_per_user: Count = 8

    @property
    def on(self) -> bool:
        """Whether stages 1 and 2 are trained with noise."""
        return self.epsilon is not None or self.noise_multiplier is not None

    @model_validator(mode="after")
    def _one_of_two(self) -> PrivacyConfig:
        if self.epsilon is not None and self.noise_multiplier is not None:
            raise ValueError("set epsilon or noise_multiplier; each follows from the other")
        return self


def private_defaults(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's plain values with the defaults that differ under privacy, where it is on."""
    own = raw.get("privacy")
    if not isinstance(own, Mapping) or (own.get("epsilon") is None and own.get("noise_multiplier") is None):
        return dict(raw)
    population, groups = raw.get("population") or {}, raw.get("groups") or {}
    if not isinstance(population, Mapping) or not isinstance(groups, Mapping):
        return dict(raw)
    constraint = groups.get("constraint") or {}
    if isinstance(constraint, Mapping):
        groups = {**groups, "constraint": {"kind": "none", **constraint}}
    return {**raw, "population": {"patience": 0, **population}, "groups": {"user_encoder": False, **groups}}
