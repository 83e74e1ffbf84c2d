"""Updates a user: continues training from the version in service, and promotes the result only if it is better.

    divide      new interactions, which the version in service has not been trained on, and earlier ones
    outliers    new interactions whose answers do not fit their inputs are left out (`comparison.outliers`)
    train       the user's adapter, from that of the version in service, on new interactions and replayed earlier
                ones, with a penalty on its distance to the start (`layers.low_rank`)
    or anew     if the version has become outdated (`change`), the user is fitted as a new one on the interactions
                since the change, embedding included; earlier interactions are not used
    compare     both versions on the newest of the new interactions and the newest earlier ones, which the update was
                not trained on; the update is promoted as it was measured, or not at all

Held-out interactions count as new at the next update. A user without an adapter is fitted as a new one (`refit`), on
all interactions but the held-out ones. An update depends only on the run, the version in service and the user's
interactions: not on other users, and not on a kill and resume.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from proper.adapters.quantization import decode, encode
from proper.adapters.serialization import fault_of
from proper.adapters.store import UserRecord
from proper.config import UsersConfig
from proper.console import no_bar
from proper.data.encoder import EncodedExample
from proper.data.histories import TextExample
from proper.enrolment.change import change_point
from proper.enrolment.comparison import Losses, State, Usual, VersionComparison, losses_of, outliers, state_of
from proper.enrolment.fit_files import is_update_of, same_update
from proper.enrolment.fit_user import Fitter, UserFit, own_bank
from proper.enrolment.history import Divided, Split, UserHistory, divide, hold_out
from proper.enrolment.place import FITTED, PLACED
from proper.enrolment.refit import Refit
from proper.files import hash_value
from proper.layers.low_rank import adapter_distance
from proper.run_folder import Tier
from proper.training.checkpoint import Checkpoint, seed_of
from proper.training.jobs import PARTS, FitResult, Job, passes_of
from proper.training.multi_user_trainer import MultiUserTrainer
from proper.training.optim import resolve_rate

OUTLIER_ITEMS = 64
"""Most earlier interactions, the newest, that give the usual loss for the search for outliers."""


@dataclass(frozen=True)
class FitOutcome:
    """Result of a fit.

    Attributes:
        record: the new version; None if the version in service stays.
        base: the version in service; None without one.
        reason: why it was promoted or not, in one line; None for a first fit.
        metrics: the losses that were compared, and numbers of interactions.
    """

    record: UserRecord | None
    base: int | None = None
    reason: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)


def fit_or_update(fitter: Fitter, fit: UserFit) -> FitOutcome:
    """Fit a user unknown to the store, or update a known one; nothing is put into the store.

    Raises:
        NonFiniteLossError: the embedding's loss is not finite.
    """
    head = fit.store.head(fit.user)
    base = None if head is None else fit.store.get(fit.user, head.version)
    if head is None or base is None:
        return FitOutcome(fitter.fit(fit))
    if base.metadata.get("embedding") == PLACED:  # answers until the first fit, which need not be better
        return FitOutcome(fitter.fit(fit), head.version)
    committed = _committed(fit, head.version, base)
    if committed is not None:
        return committed
    state = hash_value([base.embedding.tolist(), dict(base.metadata), fitter.model.config.users.model_dump()])
    same_update(fit.work, fit.grown, head.version, state)
    with fitter.model.model.caching(fit.work, fitter.model.config.compute.cache_mb), own_bank(fitter.model):
        return _Update(fitter, fit, base, head.version).result()


def _committed(fit: UserFit, version: int, base: UserRecord) -> FitOutcome | None:
    """Return the result of an update that was put into the store before a kill, and is the version in service now."""
    made = base.metadata.get("made", {})
    if made.get("by") != "update" or version != made["of"] + 1 or not is_update_of(fit.work, fit.grown, made["of"]):
        return None
    return FitOutcome(base, made["of"], base.metadata["reason"], base.metadata["update"])


@dataclass(frozen=True)
class _Update:
    """The update of one user; `base` is the version in service, and `version` its number."""

    fitter: Fitter
    fit: UserFit
    base: UserRecord
    version: int

    @property
    def grown(self) -> UserHistory:
        return self.fit.grown

    @property
    def config(self) -> UsersConfig:
        return self.fitter.model.config.users

    def result(self) -> FitOutcome:
        divided = divide(self.grown, self.base.metadata)
        divided = replace(divided, past=divided.past[-(self.config.max_items or len(divided.past)) :])
        came = len(divided.new)
        if not came:
            return FitOutcome(None, self.version, "there is no new interaction")
        divided = self._without_outliers(divided)
        metrics = {"logged": self.grown.logged, "new": came, "left_out": came - len(divided.new)}
        if not divided.new:
            return self._not_promoted(f"the answers do not fit their inputs (new interactions: {came})", metrics)
        changed = self._since_change(divided)
        divided, anew = changed or divided, changed is not None
        if len(divided.new) == 1:
            return self._not_promoted("one new interaction cannot be both trained on and held out", metrics)
        refit = anew or self.base.adapter is None or self.fitter.model.stage != Tier.USERS
        split = hold_out(divided, self.config.tiers.validation, anew=refit)
        return self._refit(divided, split, metrics, anew) if refit else self._trained_on(divided, split, metrics)

    def _since_change(self, divided: Divided) -> Divided | None:
        """Return the new interactions since the user's habits changed, without earlier ones; None if they did not."""
        held_out = len(hold_out(divided, self.config.tiers.validation).held_new)
        tried, model = self._encoded(divided.new[: len(divided.new) - held_out]), self.fitter.model
        assert model.served is not None
        at = change_point(
            losses_of(model, state_of(model, self.base), tried)[0], losses_of(model, State(model.served.mean), tried)[0]
        )
        if at is None:
            return None
        return replace(divided, past=(), new=divided.new[at:], since=self.grown.ordinals[divided.new[at].id])

    def _not_promoted(self, reason: str, metrics: Mapping[str, Any]) -> FitOutcome:
        return FitOutcome(None, self.version, f"not promoted: {reason}", metrics)

    def _without_outliers(self, divided: Divided) -> Divided:
        served, limit = self.fitter.model.served, self.config.update.outlier
        assert served is not None
        if limit is None:
            return divided
        past = self._encoded(divided.past[-OUTLIER_ITEMS:])
        found = outliers(self.fitter.model, past, self._encoded(divided.new), limit, served.mean)
        left_out = {divided.new[at].id for at in found}
        new = tuple(item for item in divided.new if item.id not in left_out)
        ordinals = sorted(self.grown.ordinals[each] for each in left_out)
        return replace(divided, new=new, left_out=(*divided.left_out, *ordinals))

    def _trained_on(self, divided: Divided, split: Split, metrics: dict[str, Any]) -> FitOutcome:
        """Train the user's adapter on from the version in service, and compare the two."""
        start = state_of(self.fitter.model, self.base)
        assert start.row is not None
        rows = self._rows(split)
        metrics |= {"trained": len(split.new), "replayed": len(rows) - len(split.new)}
        result = self._train(start, rows, self._encoded([*split.held_past, *split.held_new]))
        if result.row is None or result.state.best == 0:
            return self._not_promoted(result.reason or "no pass lowered the held-out loss", metrics)
        tensors = self.fitter.model.model.user_layout(self.config).unpack(result.row)
        fault = fault_of(tensors)
        if fault is not None:
            return self._not_promoted(f"quarantined: {fault}", metrics)
        # Compared in the form that is stored and served.
        adapter = encode(tensors, self.config.storage)
        candidate = UserRecord(self.base.user, Tier.USERS, self.base.embedding, decode(adapter))
        state = state_of(self.fitter.model, candidate)
        found, after = self._compare(state, split)
        metrics |= {"passes": result.state.best, "distance": self._moved(start.row, result.row), **found.metrics()}
        if not found.is_better(self.config.update.past):
            return self._not_promoted(found.text(), metrics)
        kept = {key: self.base.metadata[key] for key in ("embedding",) if key in self.base.metadata}
        record = replace(candidate, adapter=adapter, metadata={**kept, **self._group_losses(split, state, after)})
        return self._promoted(record, found.text(), metrics, divided, split, after)

    def _rows(self, split: Split) -> tuple[EncodedExample, ...]:
        """Return an update's training rows: the new ones, and a sample of earlier ones, in the order of time."""
        share = self.config.update.replay
        wanted = min(len(split.past), round(share / (1 - share) * len(split.new)))
        draw = random.Random(seed_of(self.fitter.seed, "replay", self.base.user, self.version))
        replayed = sorted(draw.sample(range(len(split.past)), wanted))
        return self._encoded([*(split.past[at] for at in replayed), *split.new])

    def _train(self, start: State, rows: Sequence[EncodedExample], held_out: Sequence[EncodedExample]) -> FitResult:
        model, config, found = self.fitter.model, self.config, list[FitResult]()
        per_pass = -(-len(rows) // config.batch_size)
        passes = max(1, -(-config.update.steps // per_pass))
        job = Job(
            self.base.user,
            start.embedding,
            tuple(rows),
            tuple(held_out),
            epochs=passes,
            measured=tuple(sorted({passes_of(passes, part) for part in range(1, PARTS + 1)})),
            start=start.row,
            anchor=start.row,
        )
        size = self._size(start.row)
        config = config.model_copy(update={"distance": config.update.distance / size if size else 0.0})
        rate = resolve_rate(config.learning_rate, "users", model.model.backbone.hidden_size)
        trainer = MultiUserTrainer(model.model, config, rate, self.fitter.seed, 1, model.model.backbone.pad_id)
        checkpoint = Checkpoint(self.fit.work / "update.checkpoint", model.config.compute.checkpoint_seconds)

        def done(results: Sequence[FitResult], again: bool) -> None:
            found.extend(results)

        def step(metrics: Mapping[str, Any]) -> None:
            self.fit.on_progress("update", min(1.0, metrics["step"] / (per_pass * passes)))

        trainer.run([job], done, checkpoint, step, "update", no_bar)
        return found[0]

    def _refit(self, divided: Divided, split: Split, metrics: dict[str, Any], anew: bool) -> FitOutcome:
        """Fit a user as a new one, with the embedding if `anew`, and compare that with the version in service."""
        order = {item.id: at for at, item in enumerate(self.grown.items)}

        def joined(*parts: Sequence[TextExample]) -> list[TextExample]:
            return sorted((item for part in parts for item in part), key=lambda item: order[item.id])

        items = joined(split.past, split.new)
        items = items[-(self.config.max_items or len(items)) :]
        embeds = anew or self.base.metadata.get("embedding") == FITTED
        held_out = joined(split.held_past, split.held_new)
        record = Refit(self.fitter, self.fit, self.base, items, held_out, embeds).record()
        metrics |= {"trained": len(split.new), "anew": anew}
        if record.adapter is None and not embeds:
            return self._not_promoted(str(record.metadata["reason"]), metrics)
        found, after = self._compare(state_of(self.fitter.model, _decoded(record)), split)
        metrics |= found.metrics()
        if not found.is_better(self.config.update.past):
            return self._not_promoted(found.text(), metrics)
        return self._promoted(record, found.text(), metrics, divided, split, after)

    def _promoted(
        self, record: UserRecord, reason: str, metrics: Mapping[str, Any], divided: Divided, split: Split, after: Losses
    ) -> FitOutcome:
        logged = self.grown.ordinals[split.held_new[0].id] - 1
        history: dict[str, Any] = {"run": self.grown.run, "logged": logged}
        history |= {"left_out": list(divided.left_out)} if divided.left_out else {}
        history |= {"since": divided.since} if divided.since else {}
        made = {"by": "update", "of": self.version}
        metadata: dict[str, Any] = {"history": history, "made": made, "update": dict(metrics), "reason": reason}
        usual = Usual.of((after[0] / after[1].clamp(min=1)).tolist())  # on what it was not trained on
        if usual is not None:
            metadata["usual"] = usual.metadata()
        record = replace(record, metadata={**record.metadata, **metadata})
        return FitOutcome(record, self.version, reason, metrics)

    def _compare(self, updated: State, split: Split) -> tuple[VersionComparison, Losses]:
        """Return the comparison of the two versions, and the losses of the update on all held-out interactions."""
        model, held = self.fitter.model, self._encoded([*split.held_new, *split.held_past])
        assert model.served is not None
        new = len(split.held_new)
        served, after = (losses_of(model, each, held) for each in (state_of(model, self.base), updated))
        unknown = losses_of(model, State(model.served.mean), held[:new])
        return VersionComparison.of(new, served, after, unknown), after

    def _group_losses(self, split: Split, state: State, after: Losses) -> dict[str, float]:
        """Return the held-out loss of the group tier and with the adapter, as stage 3's metadata has them."""
        held = self._encoded([*split.held_new, *split.held_past])
        group = losses_of(self.fitter.model, State(state.embedding), held)
        losses = {"group_loss": group, "user_loss": after}
        return {name: float(totals.sum() / tokens.sum()) for name, (totals, tokens) in losses.items()}

    def _moved(self, start: Float[Tensor, "P"], row: Float[Tensor, "P"]) -> float:
        """Return the squared distance to the version in service, relative to its squared size."""
        size = self._size(start)
        return self._size(row, start) / size if size else 0.0

    def _size(self, row: Float[Tensor, "P"] | None, other: Float[Tensor, "P"] | None = None) -> float:
        """Return the squared size of an adapter's products B A, or their squared distance to those of another."""
        if row is None:
            return 0.0
        layout = self.fitter.model.model.user_layout(self.config)
        pair = None if other is None else layout.factors(other.float())
        return float(adapter_distance(layout.factors(row.float()), pair, self.config.alpha / self.config.rank))

    def _encoded(self, items: Sequence[TextExample]) -> tuple[EncodedExample, ...]:
        return tuple(self.fitter.model.encoder.encode(item) for item in items)


def _decoded(record: UserRecord) -> UserRecord:
    """Return a record with the adapter in its computing form, out of the storage form."""
    return record if record.adapter is None else replace(record, adapter=decode(record.adapter))
