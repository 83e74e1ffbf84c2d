"""Drift: how much worse the version in service fits a user's new interactions than is usual for the user.

The statistic is a one-sided CUSUM (Page 1954, Biometrika 41) of the new interactions' losses per answer token x_i, in
the order of arrival, against the user's usual loss: mean m and variance s^2 over n_0 interactions that the version was
not trained on, as its metadata has them,

    z_i = (x_i - m) / (s~ sqrt(1 + 1 / n_0)),  clipped to [-3, 3]        S_i = max(0, S_(i-1) + z_i - allowance)

and the user has drifted if the last S is at least the threshold. S returns to 0 for a user who changes and goes back.
A few interactions determine s^2 poorly, so it is shrunk toward the mean s_0^2 over the run's users, as in the
moderated t statistic (Smyth 2004, Stat. Appl. Genet. Mol. Biol. 3), with d = n_0 - 1 and d_0 = `PRIOR_DEGREES`:

    s~^2 = (d_0 s_0^2 + d s^2) / (d_0 + d)

1 / n_0 is the uncertainty of m, as in a prediction interval. Clipping bounds what one odd interaction can do.

An update is due for users who have drifted, and for users whose new interactions are as many as those that the version
was trained on: a version that was trained on few gains by more, without drift. An attempt that was not promoted is not
repeated before there are `RETRY` times as many new interactions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from proper.adapters.store import AdapterStore
from proper.enrolment.comparison import Usual, per_item, state_of
from proper.enrolment.fit_user import Fitter, own_bank
from proper.enrolment.history import UserHistory, divide
from proper.enrolment.place import PLACED
from proper.interactions.log import InteractionLog
from proper.json_records import number
from proper.run_folder import Tier

PRIOR_DEGREES = 4.0
"""Degrees of freedom of the variance over the run's users, in the shrunk variance of one user."""
CLIP = 3.0
"""Largest standardized loss."""
DEFAULT_VARIANCE = 1.0
"""Variance where no user's is known."""
MANY, UNLIKELY = 3, 0.05
"""Fewest drifted users of a group, and the probability below which so many are no chance, that say it has changed."""
RETRY = 1.5
"""Factor on the number of new interactions from one attempt to the next."""


@dataclass(frozen=True)
class Drift:
    """How well a user's new interactions fit the version in service; numbers only, no texts.

    Attributes:
        user: the user's id.
        tier: tier of the version in service.
        version: its number.
        new: number of interactions that it has not been trained on.
        loss: mean over these of the loss per answer token, in nats; None without any.
        usual: the user's usual loss; None if it is not known.
        z: standardized difference of the two means.
        score: the CUSUM after the last interaction.
        drifted: whether the score is at least the threshold.
        known: number of interactions that the version was trained on.
        tried: number of new interactions at the last attempt to update it, which was not promoted; 0 without one.
    """

    user: str
    tier: Tier
    version: int
    new: int
    loss: float | None = None
    usual: float | None = None
    z: float | None = None
    score: float = 0.0
    drifted: bool = False
    known: int = 0
    tried: int = 0

    @property
    def grown(self) -> bool:
        """Whether the new interactions are as many as those that the version was trained on."""
        return self.new >= self.known

    @property
    def due(self) -> bool:
        """Whether an update is worth its cost (see the module)."""
        return (self.drifted or self.grown) and self.new >= RETRY * self.tried

    def text(self) -> str:
        """Return the figures in words."""
        if self.loss is None or self.usual is None:
            return f"{self.new} new interactions, usual loss not known"
        state = "drifted" if self.drifted else "not drifted"
        losses = f"loss {self.loss:.3f}, usually {self.usual:.3f} nats per token"
        return f"{state}: score {self.score:.2f} after {self.new} new interactions ({losses})"


def usual_of(metadata: Mapping[str, Any], tier: str) -> Usual | None:
    """Return a user's usual loss from a version's metadata; None if it has none.

    Figures that are not finite count as none: a loss can be NaN, which an export writes as null, and an import takes
    whatever its file says. They would end the measurement of every other user.
    """
    kept = metadata.get("usual")
    if isinstance(kept, dict) and (usual := _usual(kept.get("mean"), kept.get("variance"), kept.get("items"))):
        return usual
    mean = metadata.get("user_loss" if tier == Tier.USERS else "group_loss")
    if usual := _usual(mean, metadata.get("variance"), metadata.get("held_out")):
        return usual
    losses = metadata.get("embedding_losses")
    finite = [loss for each in (losses if isinstance(losses, list) else ()) if (loss := number(each)) is not None]
    return Usual(min(finite), None, 1) if finite else None


def _usual(mean: Any, variance: Any, items: Any) -> Usual | None:
    """Return these figures if the mean is finite and of one item or more."""
    loss, spread, amount = number(mean), number(variance), number(items)
    if loss is None or amount is None or amount < 1:
        return None
    return Usual(loss, spread if spread is not None and spread >= 0 else None, int(amount))


def usual_variance(store: AdapterStore) -> float:
    """Return the mean variance of the loss over the store's users; `DEFAULT_VARIANCE` if none is known."""
    return _measured(store)[0]


def _measured(store: AdapterStore) -> tuple[float, int]:
    """Return the mean variance, and the number of users."""
    found = [usual_of(metadata, tier) for _, tier, metadata, _ in store.metadata()]
    known = [each.variance for each in found if each is not None and each.variance is not None]
    return (fmean(known) if known and any(known) else DEFAULT_VARIANCE), len(found)


@dataclass
class KnownVariance:
    """The `usual_variance` of a store that changes by one user from call to call.

    It is measured again after as many calls as one in a hundred users: it is a mean over all of them, and to read a
    million users for each fit would take as long as the fit.
    """

    _value: float = DEFAULT_VARIANCE
    _calls_left: int = 0

    def of(self, store: AdapterStore) -> float:
        """Return the mean variance; `store` is the same in every call."""
        if not self._calls_left:
            self._value, users = _measured(store)
            self._calls_left = max(1, users // 100)
        self._calls_left -= 1
        return self._value


def deviation(usual: Usual, variance: float) -> float:
    """Return the standard deviation of one new loss around the usual one, given the mean `variance` over users."""
    degrees = max(0, usual.items - 1) if usual.variance is not None else 0
    shrunk = (PRIOR_DEGREES * variance + degrees * (usual.variance or 0.0)) / (PRIOR_DEGREES + degrees)
    return math.sqrt(shrunk * (1 + 1 / usual.items)) or math.sqrt(DEFAULT_VARIANCE)


def cusum(losses: Iterable[float], usual: Usual, variance: float, allowance: float) -> float:
    """Return the CUSUM after the last loss (see the module)."""
    score, unit = 0.0, deviation(usual, variance)
    for loss in losses:
        z = (loss - usual.mean) / unit if math.isfinite(loss) else CLIP
        score = max(0.0, score + min(CLIP, max(-CLIP, z)) - allowance)
    return score


def drift_of(
    fitter: Fitter, store: AdapterStore, log: InteractionLog, user: str, grown: UserHistory, variance: float
) -> Drift | None:
    """Return a user's drift, measured by one forward pass over the new interactions; None for an unknown user."""
    config = fitter.model.config.users.drift
    head = store.head(user)
    record = None if head is None else store.get(user, head.version)
    if head is None or record is None:
        return None
    divided = divide(grown, record.metadata)
    new, attempts = divided.new, log.updates.of(store.tenant, user)[:1]
    tried = [int(each.metrics["new"]) for each in attempts if (each.base, each.version) == (head.version, None)]
    found = Drift(user, head.tier, head.version, len(new), known=len(divided.past), tried=sum(tried))
    if not new:
        return found
    with own_bank(fitter.model):
        state = state_of(fitter.model, record)
        losses = per_item(fitter.model, state, [fitter.model.encoder.encode(item) for item in new])
    usual, loss = usual_of(record.metadata, head.tier), fmean(losses)
    if usual is None:
        return replace(found, loss=loss)
    score = cusum(losses, usual, variance, config.allowance)
    unit = deviation(usual, variance)
    error = math.sqrt(1 / len(new) + 1 / usual.items) / math.sqrt(1 + 1 / usual.items) * unit
    z = (loss - usual.mean) / error if math.isfinite(loss) else CLIP
    return replace(found, loss=loss, usual=usual.mean, z=z, score=score, drifted=score >= config.threshold)


def drifts(fitter: Fitter, store: AdapterStore, log: InteractionLog, users: Sequence[str]) -> list[Drift]:
    """Return the drift of those of these users who have logged interactions, the highest score first."""
    variance = usual_variance(store)
    found = []
    for user in users:
        if not log.count(store.tenant, user):
            continue
        grown = fitter.history(log, store.tenant, user)
        drift = drift_of(fitter, store, log, user, grown, variance)
        if drift is not None and drift.new:
            found.append(drift)
    return sorted(found, key=lambda drift: (-drift.score, drift.user))


@dataclass(frozen=True)
class GroupDrift:
    """How many users of a group have drifted, of those with new interactions and a known usual loss.

    Attributes:
        group: the group with the highest mean gate of these users.
        users: number of users.
        drifted: how many have drifted.
        chance: probability of at least that many, if users of this group drift as often as those of the others.
    """

    group: int
    users: int
    drifted: int
    chance: float

    @property
    def together(self) -> bool:
        """Whether so many have drifted that the group has changed, which `proper groups refresh` follows."""
        return self.drifted >= MANY and self.chance < UNLIKELY


def by_group(found: Sequence[Drift], main: Mapping[str, int]) -> list[GroupDrift]:
    """Return the drift of each group's users, in the order of groups.

    If many users of one group drift at the same time, the group has probably changed, not each user independently.

    Args:
        found: the users' drift.
        main: the group with the highest mean gate of each user; users without one are left out.
    """
    groups: dict[int, list[bool]] = {}
    for drift in found:
        if drift.user in main and drift.usual is not None:
            groups.setdefault(main[drift.user], []).append(drift.drifted)
    every = [drifted for each in groups.values() for drifted in each]
    each_group = []
    for group, own in sorted(groups.items()):
        # One drifted and one usual user more, so that the rate is neither 0 nor 1.
        rate = (sum(every) - sum(own) + 1) / (len(every) - len(own) + 2)
        each_group.append(GroupDrift(group, len(own), sum(own), _at_least(sum(own), len(own), rate)))
    return each_group


def _at_least(count: int, trials: int, rate: float) -> float:
    """Return the probability of at least `count` successes in `trials` trials."""
    return sum(math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(count, trials + 1))


def not_due(
    fitter: Fitter, store: AdapterStore, log: InteractionLog, user: str, grown: UserHistory, variance: KnownVariance
) -> Drift | None:
    """Return the drift of a user for whom no update is due, as far as is known; None for any other.

    A user without a version, with one that was only placed, or without a known usual loss is not kept waiting.
    """
    versions = store.versions(user)
    if not versions or versions[0].metadata.get("embedding") == PLACED:
        return None
    drift = drift_of(fitter, store, log, user, grown, variance.of(store))
    known = drift is not None and (drift.usual is not None or not drift.new)
    return drift if known and drift is not None and not drift.due else None
