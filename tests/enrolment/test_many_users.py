"""Many users enrolled at once get what each gets alone; the encoder's embedding serves them before the fit."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from proper.adapters.store import AdapterStore
from proper.enrolment import many_users, worker
from proper.errors import ChangedError, InputError
from proper.interactions.deletion import remove
from proper.interactions.log import InteractionLog
from proper.models.user_encoder import Pooling, Readout, UserEncoder, load_encoder, save_encoder
from proper.run_folder import RunFolder
from proper.training.encoder_regression import project
from tests.enrolment.conftest import Open
from tests.enrolment.test_fit_user import record, rows, run, trained

__all__ = ["run", "trained"]


@pytest.fixture
def encoded(run: Path, opened: Open) -> Path:
    """A run with an encoder of random weights."""
    model = opened(run)
    assert model.personalized.served is not None
    draw = torch.Generator().manual_seed(0)
    projection = project(torch.randn(80, 4 * model.personalized.model.backbone.hidden_size, generator=draw))
    width = projection.surprise.shape[1] * (1 + projection.context.shape[1]) + projection.answer.shape[1]
    pooling = Pooling(torch.zeros(width), torch.ones(width), torch.ones(width))
    readout = Readout(0.05 * torch.randn(16, width, generator=draw), torch.empty(0), torch.empty(16, 0))
    save_encoder(RunFolder(run).encoder, UserEncoder(projection, pooling, readout, model.personalized.served.mean, {}))
    return run


@pytest.mark.parametrize("select", [True, False])
def test_many_are_enrolled_as_each_alone(encoded: Path, opened: Open, tmp_path: Path, select: bool) -> None:
    raw = yaml.safe_load((encoded / "config.yaml").read_text(encoding="utf-8"))
    raw["users"] |= {"tiers": {**raw["users"]["tiers"], "select": select}, "storage": "fp32"}
    (encoded / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    alone = shutil.copytree(encoded, tmp_path / "alone")
    new = {"new": rows(3, 9), "few": rows(8, 3), "one": rows(1, 1)}
    users, phases = opened(encoded).users, list[str]()
    before = record(encoded, "ann")
    users.enrol_many(
        {user: users.entries(user, own) for user, own in new.items()}, on_progress=lambda p, _: phases.append(p)
    )
    assert list(dict.fromkeys(phases)) == ["place", "embeddings", "trial" if select else "final", "fit"]
    for user, own in new.items():
        opened(alone).users.enrol(user, own)
        mine, theirs = record(encoded, user), record(alone, user)
        assert mine.tier == theirs.tier and mine.metadata["embedding"] == "fitted"
        assert mine.metadata["embedding_passes"] == theirs.metadata["embedding_passes"]
        assert (mine.adapter is None) == (theirs.adapter is None) == select
        for name, tensor in (mine.adapter or {}).items():
            torch.testing.assert_close(tensor, (theirs.adapter or {})[name], rtol=0, atol=1e-3)
        assert mine.metadata["embedding_start"] == "ridge" and [v.version for v in users.versions(user)] == [2, 1]
        torch.testing.assert_close(mine.embedding, theirs.embedding, rtol=0, atol=1e-3)
    assert torch.equal(record(encoded, "ann").embedding, before.embedding) and users.versions("ann")[0].version == 2


def test_without_refining_users_keep_the_placed_embedding_until_an_update(encoded: Path, opened: Open) -> None:
    model = opened(encoded)
    users, served = model.users, model.personalized.served
    users.enrol_many({"new": users.entries("new", rows(3, 9))}, refine=False)
    placed = record(encoded, "new")
    encoder = load_encoder(RunFolder(encoded).encoder)
    assert encoder is not None and served is not None
    assert (placed.tier, placed.metadata["embedding"]) == ("groups", "placed") and model.tier("new") == "groups"
    assert not torch.equal(placed.embedding, served.mean)
    assert users.log.queue.fit("", "new").state == "queued"
    users.update("new")
    fitted = record(encoded, "new")
    assert fitted.metadata["embedding"] == "fitted" and len(users.versions("new")) == 2
    assert users.rollback("new") == 3 and torch.equal(record(encoded, "new").embedding, placed.embedding)


@pytest.mark.parametrize("refine", [True, False])
def test_nobody_is_placed_among_groups_that_were_refreshed_meanwhile(encoded: Path, opened: Open, refine: bool) -> None:
    users = opened(encoded).users
    with closing(AdapterStore(encoded / "users")) as store:
        store.put([], bound={"groups": "others"})
        with pytest.raises(ChangedError, match="belongs to other groups meanwhile"):
            users.enrol_many({"new": users.entries("new", rows(3, 9))}, refine=refine)
        assert store.head("new") is None and users.log.queue.fit("", "new").state == "queued"


def test_one_known_user_stops_all(encoded: Path, opened: Open) -> None:
    users = opened(encoded).users
    entries = {user: users.entries(user, rows(3, 2)) for user in ("new", "ann")}
    with pytest.raises(InputError, match="user 'ann' exists already"):
        users.enrol_many(entries)
    assert "new" not in users
    clash = users.entries("bad", [{**rows(3, 1)[0], "id": "a"}, {**rows(4, 1)[0], "id": "a"}])
    with pytest.raises(InputError, match="'a' of user '[a-z]+' exists already with other content"):
        users.enrol_many({"new": entries["new"], "bad": clash})
    assert "new" not in users and "bad" not in users


def test_a_run_without_an_encoder_places_nobody(run: Path, opened: Open) -> None:
    users = opened(run).users
    users.enrol_many({"new": users.entries("new", rows(3, 9))}, refine=False)
    store = AdapterStore(run / "users")
    assert store.head("new") is None
    store.close()
    users.update("new")
    assert record(run, "new").metadata["embedding_start"] == "mean" and len(users.versions("new")) == 1


def test_a_user_who_is_deleted_while_many_are_fitted_leaves_nothing(run: Path, opened: Open) -> None:
    users, waits = opened(run).users, list[tuple[str, ...]]()

    def on_progress(phase: str, share: float) -> None:
        if phase in ("trial", "final") and not waits:
            with closing(AdapterStore(run / "users")) as store, closing(InteractionLog(run / "users")) as log:
                waits.append(remove(store, log, "new", 0).waits)

    users.enrol_many({user: users.entries(user, rows(3, 9)) for user in ("new", "other")}, on_progress=on_progress)
    assert waits[0] and not users.log.deletions.pending()
    assert not any((run / "users" / "fits").iterdir()) and "new" not in users
    assert record(run, "other").metadata["embedding"] == "fitted"


def test_a_deletion_does_not_wait_for_users_who_are_fitted_later(
    run: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (worker, many_users):
        monkeypatch.setattr(module, "USERS_PER_BATCH", 1)
    users, waits = opened(run).users, list[int]()

    def on_progress(phase: str, share: float) -> None:
        if phase == "embeddings":
            with closing(AdapterStore(run / "users")) as store, closing(InteractionLog(run / "users")) as log:
                if not waits:
                    assert remove(store, log, "new", 0).waits
                waits.append(len(log.deletions.pending()))

    users.enrol_many({user: users.entries(user, rows(3, 9)) for user in ("new", "other")}, on_progress=on_progress)
    assert waits == [1, 0]
    assert "new" not in users and record(run, "other").metadata["embedding"] == "fitted"


@pytest.mark.parametrize("refine", [True, False])
def test_whom_a_worker_has_fitted_meanwhile_keeps_that_version(
    encoded: Path, opened: Open, monkeypatch: pytest.MonkeyPatch, refine: bool
) -> None:
    users, server, place_users = opened(encoded).users, opened(encoded).users, worker.place_users

    def later(*given: Any) -> None:
        monkeypatch.setattr(worker, "place_users", place_users)
        assert server.worker.fit_next("", "new")  # the server's worker, while this process loads the model
        place_users(*given)

    monkeypatch.setattr(worker, "place_users", later)
    users.enrol_many({user: users.entries(user, rows(3, 9)) for user in ("new", "other")}, refine=refine)
    assert record(encoded, "new").metadata["embedding"] == "fitted" and len(users.versions("new")) == 2
    assert record(encoded, "other").metadata["embedding"] == ("fitted" if refine else "placed")
    fits = encoded / "users" / "fits"
    assert not fits.is_dir() or not any(fits.iterdir())
