"""Methods with changes in their names: what they train, on which data, and what they take over."""

from __future__ import annotations

import json
import logging
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from proper import pipeline
from proper.config import Config
from proper.data.dataset import Dataset
from proper.data.derived.copies import keep_asking, shorten_histories
from proper.errors import ConfigError, DataError
from proper.methods.derived_runs import varied
from proper.methods.overrides import split_name
from proper.methods.table import known_methods, require_targets


def test_names_with_changes_are_split() -> None:
    assert split_name("users") == ("users", [])
    assert split_name("rag-2[history=5][users.rank=2]") == ("rag-2", [("history", "5"), ("users.rank", "2")])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("groups[experts]", "write changes as"),
        ("groups[groups.experts=8", "write changes as"),
        ("groups[groups.expert=8]", "expert"),
        ("groups[groups.experts=many]", "groups.experts"),
        ("groups[nothing.experts=8]", "no setting of a stage"),
        ("groups[groups.constraints.kind=none]", "no setting 'groups.constraints.kind'"),
        ("population[groups.experts=8]", "trains nothing that this changes"),
        ("user-majority[users.rank=2]", "trains nothing that this changes"),
        ("users[users.gradient_accumulation=4]", "stage 3 does not use 'users.gradient_accumulation'"),
        ("users[history=0]", "history is a number of rows"),
        ("group[groups.experts=8]", "did you mean 'groups'"),
    ],
)
def test_impossible_changes_are_named(name: str, says: str, settings: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=says.replace("[", r"\[")):
        known_methods([name], settings())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("users-paper", "users.router: paper is trained on all users"),
        ("groups[groups.experts=8][groups.max_tokens=999]", "groups.max_tokens: 999"),
        ("groups-shared-e", "one user's, whom privacy would clip as one"),
    ],
)
def test_what_privacy_excludes_is_refused_before_training(
    name: str, says: str, settings: Callable[..., Config]
) -> None:
    with pytest.raises(ConfigError, match=says):
        known_methods([name], settings(privacy={"noise_multiplier": 1.0}))


def test_a_method_that_trains_on_others_needs_some(
    settings: Callable[..., Config], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["released", "population[population.train_on=others]"]
    with Dataset.open(run / "data.sqlite") as dataset:
        require_targets(known_methods(names, settings()), dataset)
        targets = list(dataset.users("target"))
        monkeypatch.setattr(dataset, "users", lambda role=None: iter(() if role == "other" else targets))
        for name in names:
            with pytest.raises(DataError, match=re.escape(f"'{name}' trains population on users who are not targets")):
                require_targets(known_methods(["oppu", name], settings()), dataset)


def test_what_a_change_does_not_touch_is_the_run_s_own(settings: Callable[..., Config]) -> None:
    names = [
        "groups[groups.experts=8]",
        "users[users.rank=2]",
        "users[population.rank=2]",
        "oppu[history=5]",
        "rag[history=5]",
    ]
    found = {method.name: method for method in known_methods(names, settings())}
    assert list(found) == names
    inherits = [found[name].variant.inherits for name in names]  # type: ignore[union-attr]
    assert inherits == [("population",), ("population", "groups"), (), ("population",), ()]
    config = varied(settings(), found[names[0]].variant)  # type: ignore[arg-type]
    assert (config.groups.experts, config.groups.user_embedding) == (8, settings().groups.user_embedding)
    # A variant's own settings stay: OPPU's recipe is kept on a shorter history.
    assert varied(settings(), found["oppu[history=5]"].variant).users.router == "none"  # type: ignore[arg-type]


def test_a_nested_setting_leaves_its_neighbours(settings: Callable[..., Config]) -> None:
    (method,) = known_methods(["groups[groups.constraint.kind=none]"], settings(groups={"constraint": {"weight": 0.5}}))
    constraint = varied(settings(), method.variant).groups.constraint  # type: ignore[arg-type]
    assert (constraint.kind, constraint.weight) == ("none", 0.5)


def test_shortened_histories_keep_the_newest_of_targets_and_all_else(run: Path, tmp_path: Path) -> None:
    with Dataset.open(run / "data.sqlite") as whole:
        shorten_histories(whole, tmp_path / "short.sqlite", 2)
        with Dataset.open(tmp_path / "short.sqlite") as short:
            assert list(short.queries()) == list(whole.queries())
            assert short.sha256 != whole.sha256
            for user in whole.users():
                kept = whole.history(user.id, 2) if user.role == "target" else whole.history(user.id)
                assert short.history(user.id) == kept
                found = short.user(user.id)
                assert found is not None and (found.history, found.role) == (len(kept), user.role)


def test_rows_that_ask_for_something_else_go(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "both.sqlite"
    with Dataset.open(run / "data.sqlite") as whole:
        connection = sqlite3.connect(path)
        whole.connection.backup(connection)
    connection.execute("UPDATE texts SET prompt = prompt || char(10) || iif(id % 2, 'Colour:', 'Size:')")
    connection.commit()
    connection.close()
    with Dataset.open(path) as both:
        keep_asking(both, tmp_path / "one.sqlite", "Colour")
        with Dataset.open(tmp_path / "one.sqlite") as one:
            assert list(one.queries()) == list(both.queries())
            for user in both.users():
                kept = [row for row in both.history(user.id) if row.prompt.endswith("Colour:")]
                assert one.history(user.id) == kept
        with pytest.raises(DataError, match="no prompt of a history row ends with the line 'Taste:'"):
            keep_asking(both, tmp_path / "none.sqlite", "Taste")
    assert not (tmp_path / "none.sqlite").exists()


def test_changed_methods_answer_beside_the_others_and_share_what_is_trained(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    names = ["groups", "groups[history=2]", "users[history=2]", "rag[history=2]", "groups[groups.experts=2]"]
    results = pipeline.evaluate(run, names)
    said = caplog.text
    assert [row["method"] for row in results["metrics"] if row["primary"] and not row["trivial"]] == names
    assert len([path for path in (run / "variants").iterdir() if path.name.startswith("history-2-")]) == 1
    assert "trains groups[history=2]" in said and "trains groups[groups.experts=2]" in said
    assert not list((run / "variants" / "data").glob("*between*"))
    losses = [row["value"] for row in results["metrics"] if row["metric"] == "loss"]
    assert len(set(losses)) == len(losses)
    caplog.clear()
    pipeline.evaluate(run, names)
    assert "trains" not in caplog.text


def test_rows_whose_names_are_alike_in_file_names_stay_apart(settings: Callable[..., Config], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(settings().data.path).read_text(encoding="utf-8").splitlines()]
    path, asked = tmp_path / "rows.jsonl", ("C", "C++", "C/C")
    rows = [{**row, "asks": asked[row["timestamp"] % 3]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings(data={"path": str(path), "prompt": "{input}\n{asks}:"}, split={"min_history": 4})
    folder = pipeline.run(config, tmp_path / "run", stages=["population", "groups", "users"])
    names = [f"groups[rows={ask}]" for ask in asked]
    results = pipeline.evaluate(folder, names)
    assert [row["method"] for row in results["metrics"] if row["primary"] and not row["trivial"]] == names
    found = set[str]()
    for file in (folder / "variants" / "data").iterdir():
        with Dataset.open(file) as data:
            prompts = {row.prompt.rsplit("\n", 1)[1] for user in data.users() for row in data.history(user.id)}
        assert len(prompts) == 1
        found |= prompts
    assert found == {"C:", "C++:", "C/C:"}
    assert (folder / "predictions" / "groups[rows=C%2FC].jsonl").is_file()


def test_a_name_too_long_for_a_file_is_refused(settings: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="a method's name has at most 200 bytes"):
        known_methods([f"users[rows={'ä' * 100}]"], settings())
