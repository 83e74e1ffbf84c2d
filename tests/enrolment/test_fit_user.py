"""New and growing users: fitted as if alone, whoever came before and whatever was killed; nobody else moves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from proper.adapters.store import AdapterStore, UserRecord
from proper.config import Config
from proper.data.dataset import Dataset
from proper.enrolment.fit_embedding import FittedEmbedding
from proper.enrolment.fit_files import load_embedding, same_history, save_embedding
from proper.enrolment.history import UserHistory
from proper.enrolment.neighbours import nearest_trials
from proper.errors import DataError, InputError, RunFolderError
from proper.files import hash_file
from proper.interactions.log import InteractionLog
from proper.run_folder import UsersFolder
from tests.enrolment.conftest import Open, train_run

WORDS = ["red", "green", "blue", "small", "large", "old", "new", "quiet", "loud", "round"]


def rows(shift: int, count: int) -> list[dict[str, Any]]:
    """Interactions in the run's own columns."""
    return [
        {
            "id": f"{shift}-{at}",
            "timestamp": 100 + at,
            "input": " ".join(WORDS[(shift + at * k) % 10] for k in range(1, 4)) + " is",
            "output": WORDS[(shift + at) % 3],
        }
        for at in range(count)
    ]


@pytest.fixture(scope="module")
def trained(settings: Config, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with all three stages, its data and its config."""
    tiers = settings.users.tiers.model_copy(update={"pool_below": 6})
    users = {"epochs": 2, "steps": None, "learning_rate": 5e-3, "tiers": tiers}
    return train_run(settings, dataset, tmp_path_factory.mktemp("grow") / "run", users)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def record(folder: Path, user: str) -> UserRecord:
    store = AdapterStore(folder / "users")
    found = store.get(user)
    store.close()
    assert found is not None
    return found


def same(one: UserRecord, other: UserRecord) -> bool:
    if (one.tier, one.metadata) != (other.tier, other.metadata) or not torch.equal(one.embedding, other.embedding):
        return False
    pairs = ((tensor, (other.adapter or {})[name]) for name, tensor in (one.adapter or {}).items())
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


ALONE = """
import sys, json, proper
model = proper.load(sys.argv[1])
rows = json.loads(sys.argv[2])
model.users.enrol("new", rows[:5])
model.users.update("new", rows[5:])
model.close()
"""


def test_a_fit_is_the_same_alone_in_a_fresh_process_and_in_any_company(run: Path, opened: Open, tmp_path: Path) -> None:
    alone = shutil.copytree(run, tmp_path / "alone")
    command = [sys.executable, "-c", ALONE, str(alone), json.dumps(rows(3, 14))]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    before = {user: record(run, user) for user in ("ann", "bob")}
    shared = [hash_file(run / name) for name in ("users/router.safetensors", "groups/groups.safetensors")]
    model = opened(run)
    few = model.users.enrol("few", rows(8, 3))
    head = model.users.enrol("new", rows(3, 14)[:5])
    assert head is not None and head.version == 1 and few is not None
    model.users.update("new", rows(3, 14))
    assert same(record(run, "new"), record(alone, "new"))
    (attempt,) = model.users.log.updates.of("", "new")
    with closing(InteractionLog(alone / "users")) as log:
        (other,) = log.updates.of("", "new")
    assert (attempt.base, attempt.version, attempt.metrics) == (1, other.version, other.metrics)
    assert all(same(record(run, user), theirs) for user, theirs in before.items())
    assert shared == [hash_file(run / name) for name in ("users/router.safetensors", "groups/groups.safetensors")]
    assert not list(UsersFolder(run / "users").fits.iterdir())


def test_the_embedding_begins_at_the_mean_and_lowers_the_loss(run: Path, opened: Open) -> None:
    model = opened(run)
    served = model.personalized.served
    assert served is not None
    model.users.enrol("new", rows(3, 14))
    made = record(run, "new")
    losses = made.metadata["embedding_losses"]
    assert len(losses) == 2 and losses[made.metadata["embedding_passes"]] == min(losses)
    assert made.metadata["embedding_passes"] > 0 and not torch.equal(made.embedding, served.mean)


def test_a_known_user_grows_from_the_run_s_history(run: Path, opened: Open) -> None:
    before, model = record(run, "ann"), opened(run)
    (old,) = {each.version for each in model.users.versions("ann")[:1]}
    head = model.users.update("ann", rows(5, 4))
    after, (attempt,) = record(run, "ann"), model.users.log.updates.of("", "ann")
    assert head is not None and head.version == attempt.version == old + 1 and attempt.base == old
    assert after.metadata["history"] == {"run": 12, "logged": 3}
    assert attempt.metrics["trained"] == 3 and torch.equal(after.embedding, before.embedding)
    again = shutil.copytree(run, run.parent / "gone")
    (again / "data.sqlite").unlink()
    opened(again).users.enrol("zoe", rows(5, 4))
    assert record(again, "zoe").metadata["history"] == {"run": None, "logged": 4}


def test_one_item_gives_the_group_tier(run: Path, opened: Open) -> None:
    head = opened(run).users.enrol("one", rows(1, 1))
    assert head is not None and head.tier == "groups"
    assert record(run, "one").metadata["reason"] == "one item cannot be both trained on and held out"


def test_an_adapter_is_what_answers(run: Path, opened: Open) -> None:
    model = opened(run)
    prompt = rows(3, 1)[0]["input"]
    assert model.tier("new") == "none"
    nobody = model.score([prompt], [None], WORDS)
    head = model.users.enrol("new", rows(3, 14))
    assert head is not None and model.tier("new") == head.tier
    own = model.score([prompt], ["new"], WORDS)
    assert not torch.equal(own, nobody)
    assert torch.equal(model.score([prompt], [None], WORDS), nobody)


def test_pooled_decisions_ask_the_run_s_own_users_only(run: Path, opened: Open) -> None:
    model = opened(run)
    model.users.enrol("new", rows(3, 14))
    model.users.update("bob", rows(4, 2))
    store = AdapterStore(run / "users")
    found = nearest_trials(store, "ann", torch.ones(16), 10)
    tried = {user for user, _, metadata, _ in store.metadata() if "group_loss" in metadata}
    store.close()
    assert {"new", "bob"} <= tried and {trial.user for trial, _ in found} == tried - {"new", "bob", "ann"}


def test_bad_interactions_and_users_change_nothing(run: Path, opened: Open) -> None:
    users = opened(run).users
    with pytest.raises(InputError, match="user 'ann' exists already"):
        users.enrol("ann", rows(1, 2))
    with pytest.raises(InputError, match="there is no user 'new'"):
        users.update("new", rows(1, 2))
    bad = [*rows(1, 2), {"input": "x"}, {"prompt": "x", "target": "y", "user_id": "other"}]
    with pytest.raises(DataError, match=r"interactions\[2\]: output: missing \(and 1 more bad row\)"):
        users.enrol("new", bad)
    users.enrol("new", [{"prompt": "red is", "target": "blue", "id": "a"}])
    with pytest.raises(InputError, match="'a' of user '[a-z]+' exists already with other content"):
        users.update("new", [{"prompt": "red is", "target": "green", "id": "a"}])
    assert len(users.versions("new")) == 1
    assert users.delete("new") and "new" not in users and not users.delete("new")


def test_a_run_without_groups_has_no_users(run: Path, opened: Open) -> None:
    for stage in ("users", "groups"):
        (run / stage / "stage.json").unlink()
    with pytest.raises(RunFolderError, match="stage 'groups' is not trained yet"):
        _ = opened(run).users


def test_a_fit_does_not_go_on_from_what_was_fitted_to_other_groups(tmp_path: Path) -> None:
    work, grown = tmp_path / "work", UserHistory((), 0, 0)
    same_history(work, grown, "groups")
    save_embedding(work, FittedEmbedding(torch.ones(4), (), 1))
    same_history(work, grown, "groups")
    assert load_embedding(work) is not None
    same_history(work, grown, "refreshed")
    assert load_embedding(work) is None
