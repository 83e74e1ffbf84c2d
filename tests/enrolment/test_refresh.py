"""Refreshing the groups: what moves, what is taken along, going back, and kills."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import proper
from proper.adapters.store import AdapterStore
from proper.data.dataset import Dataset
from proper.enrolment import refresh as module
from proper.enrolment.refresh import Refreshed, refresh, roll_back
from proper.errors import NoVersionError, RunFolderError
from proper.evaluation.fingerprint import served_version
from proper.files import hash_file
from proper.inference.loading import load
from proper.interactions.deletion import remove
from proper.interactions.log import InteractionLog
from proper.models.checkpoints import load_metadata, load_tensors, save_tensors
from proper.run_folder import RunFolder, Stage
from tests.enrolment.conftest import Open
from tests.enrolment.lessons import HABIT, OTHER, lessons, record


@pytest.fixture(scope="module")
def kept(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which "new" and "ann" have new interactions; tests work in copies of it."""
    folder = Path(shutil.copytree(taught, tmp_path_factory.mktemp("grown") / "run"))
    model = proper.load(folder)
    for user, habit in (("new", HABIT), ("ann", OTHER)):
        rows = [{**row, "id": f"{user}{row['id']}"} for row in lessons(habit, 40, 8)]
        model.users.log.append("", user, model.users.entries(user, rows))
    model.close()
    return folder


@pytest.fixture(scope="module")
def whole(kept: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Refreshed]:
    """The run after a refresh, and what that returned."""
    folder = Path(shutil.copytree(kept, tmp_path_factory.mktemp("refreshed") / "run"))
    return folder, refresh(folder)


@pytest.fixture
def grown(kept: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept, tmp_path / "run"))


def everyone(folder: Path) -> list[str]:
    store = AdapterStore(folder / "users")
    found = [user for user, _ in store.users()]
    store.close()
    return found


def version(folder: Path, user: str) -> int:
    store = AdapterStore(folder / "users")
    head = store.head(user)
    store.close()
    assert head is not None
    return head.version


def served(folder: Path) -> list[str]:
    """What the evaluation of groups and of users would reuse answers by."""
    run = RunFolder(folder)
    with Dataset.open(run.data) as dataset:
        return [served_version(run, dataset, tuple(Stage)[:count]) for count in (2, 3)]


def test_users_are_taken_along_and_go_back(kept: Path, whole: tuple[Path, Refreshed], tmp_path: Path) -> None:
    grown, done = Path(shutil.copytree(whole[0], tmp_path / "run")), whole[1]
    run, users = RunFolder(grown), everyone(kept)
    old, before = hash_file(RunFolder(kept).experts), {user: record(kept, user) for user in users}
    numbers = {user: version(kept, user) for user in users}
    assert done.rows > 2 and done.users == len(users) and 0 < done.validated <= len(users)
    assert hash_file(run.experts) != old == hash_file(run.previous) and not run.refreshed.exists()
    assert load_metadata(run.experts)["logged"] > 0 and not run.users.work.exists()
    after = {user: record(grown, user) for user in users}
    assert all(each.metadata["made"]["by"] == "refresh" for each in after.values())
    for user in ("new", "ann"):
        assert not torch.equal(after[user].embedding, before[user].embedding)
    assert not {*served(grown)} & {*served(kept)}, "an evaluation would reuse answers of the groups before"
    lost = [user for user in users if before[user].adapter and after[user].adapter is None]
    refitted = [user for user in users if after[user].metadata["reason"].startswith("fitted again")]
    assert {*lost} <= {*refitted} and len(refitted) == done.worse
    for user in {*users} - {*refitted}:
        now, held = after[user].adapter or {}, before[user].adapter or {}
        assert now.keys() == held.keys() and all(torch.equal(now[name], held[name]) for name in now)
        assert after[user].metadata["made"] == {"by": "refresh", "of": numbers[user]}
    with closing(AdapterStore(grown / "users")) as store:
        for user in {*users} - {*refitted}:
            with pytest.raises(NoVersionError, match="made since the groups were refreshed"):
                store.rollback(user)  # to an adapter and an embedding for the groups before
    assert refresh(grown).rows == 0, "nothing has come since"
    save_tensors(run.refreshed, *load_tensors(run.previous))  # as a way back leaves it that is killed
    assert refresh(grown).rows == 0 and not run.refreshed.exists()
    for path in (run.refreshed, run.users.refresh):  # as a refresh leaves them that is killed before its commit
        save_tensors(path, {}, {})
    back = roll_back(grown)
    assert hash_file(run.experts) == old and not run.previous.exists() and back.users == len(users)
    for user in {*users} - {*refitted}:
        assert torch.equal(record(grown, user).embedding, before[user].embedding)
        assert record(grown, user).metadata["made"]["of"] == numbers[user]
    load(grown).close()
    with pytest.raises(RunFolderError, match="no groups from before a refresh are kept"):
        roll_back(grown)


class Killed(BaseException):
    """What a test throws into a refresh."""


@pytest.mark.parametrize(
    "name",
    ["per_item", *(pytest.param(name, marks=pytest.mark.slow) for name in ("train_groups", "settle_groups"))],
)
def test_a_refresh_killed_anywhere_ends_the_same(
    grown: Path, whole: tuple[Path, Refreshed], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = grown
    wanted, old = hash_file(RunFolder(whole[0]).experts), hash_file(RunFolder(folder).experts)

    def dies(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(module, name, dies)
        with pytest.raises(Killed):
            refresh(folder)
    if name != "settle_groups":
        assert hash_file(RunFolder(folder).experts) == old
    model = load(folder)
    model.close()
    refresh(folder)
    assert hash_file(RunFolder(folder).experts) == wanted and not RunFolder(folder).users.work.exists()
    for user in everyone(whole[0]):
        assert torch.equal(record(folder, user).embedding, record(whole[0], user).embedding)


def test_users_who_are_left_out_and_a_process_that_loaded_the_groups_before(grown: Path, opened: Open) -> None:
    model = opened(grown)
    alone = {user: record(grown, user) for user in ("new", "ann")}
    with module._opened(grown) as work:
        assert {row.user for row in work.rows({"new", "ann"}).examples} == set()
        assert "ann" not in {row.user for row in work.rows({"ann"}).examples}
    refresh(grown, {"ann"})
    assert torch.equal(record(grown, "ann").embedding, alone["ann"].embedding)
    assert not torch.equal(record(grown, "new").embedding, alone["new"].embedding)
    with pytest.raises(Exception, match="refreshed since"):
        model.users.update("new")


def test_groups_that_were_trained_with_privacy_are_not_refreshed(grown: Path) -> None:
    path = RunFolder(grown).config
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    raw["privacy"]["epsilon"] = 8
    raw["population"]["patience"], raw["groups"]["user_encoder"] = 0, False
    raw["groups"]["constraint"]["kind"] = "none"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    with pytest.raises(RunFolderError, match="was trained with privacy, and a refresh trains without noise"):
        refresh(grown)


@pytest.mark.parametrize("when", ["train", "_revalidated"])
def test_a_user_of_another_tenant_ends_a_refresh_that_has_begun(
    grown: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A server fits the first user of another tenant meanwhile: the refresh neither commits nor blocks deletions."""
    old, step = hash_file(RunFolder(grown).experts), getattr(module._Work, when)
    theirs = replace(record(grown, "new"), user="theirs")

    def after(work: Any, *rest: Any) -> Any:
        found = step(work, *rest)
        with closing(AdapterStore(grown / "users", "acme")) as store:
            store.put([theirs], only_new=True)
        return found

    monkeypatch.setattr(module._Work, when, after)
    for _ in range(2):
        with pytest.raises(RunFolderError, match="has users of other tenants"):
            refresh(grown)
    assert hash_file(RunFolder(grown).experts) == old
    with closing(AdapterStore(grown / "users")) as store, closing(InteractionLog(grown / "users")) as log:
        assert remove(store, log, "new").waits == ()


def test_what_others_do_to_users_while_they_are_validated_is_not_undone(
    grown: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While users are validated, a server rolls "new" back and stores a user who has just been fitted."""
    others = AdapterStore(grown / "users")
    others.put([record(grown, "new")])
    before = version(grown, "new")
    validate, changed = module._Work._revalidated, list[str]()

    def revalidated(work: Any, user: str, *rest: Any) -> Any:
        found = validate(work, user, *rest)
        if user == "new" and not changed:
            changed.append(user)
            others.rollback(user)
            others.put([replace(record(grown, "ann"), user="late")])
        return found

    monkeypatch.setattr(module._Work, "_revalidated", revalidated)
    done = refresh(grown)
    assert changed and done.users == len(everyone(grown))
    for user, number in (("new", before + 1), ("late", 1)):
        made = [each.metadata.get("made") for each in others.versions(user)]
        assert {"by": "refresh", "of": number} in made or {"by": "refresh", "of": number, "refit": True} in made
    others.close()
