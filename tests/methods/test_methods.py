"""Every method from end to end on a few made-up users, and what the controls claim to be."""

from __future__ import annotations

import itertools
import json
import logging
import math
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml

from proper import pipeline
from proper.adapters.quantization import decode, encode
from proper.adapters.store import AdapterStore
from proper.cli.app import main
from proper.config import Config
from proper.data.dataset import Dataset
from proper.data.derived.views import SINGLE_USER
from proper.errors import ConfigError
from proper.evaluation.runner import answer_losses
from proper.export.converted_models import in_int8
from proper.inference.loading import load
from proper.inference.score import score
from proper.methods.derived_runs import varied
from proper.methods.end_to_end import JointTraining
from proper.methods.spec import TrainedRun
from proper.methods.stage_methods import derangement
from proper.methods.table import all_methods
from proper.run_folder import Tier
from tests.methods.conftest import answers, steps_of

LABELS = ["blue", "green", "red"]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def folder_of(run: Path, name: str) -> Path:
    (found,) = (path for path in (run / "variants").iterdir() if path.name[:-9] == name)
    return found


@pytest.fixture(scope="module")
def judged(run: Path, settings: Callable[..., Config]) -> Path:
    pipeline.evaluate(run, list(all_methods(settings())))
    return run


def test_every_method_answers_every_query_in_one_table(judged: Path, settings: Callable[..., Config]) -> None:
    results, names = read(judged / "results.json"), list(all_methods(settings()))
    assert [row["method"] for row in results["metrics"] if row["primary"]] == names
    assert [row["method"] for row in results["cost"]] == names
    with Dataset.open(judged / "data.sqlite") as dataset:
        queries = [(query.id, query.user, query.target) for query in dataset.queries()]
    for name in names:
        assert [(row["id"], row["user"], row["target"]) for row in answers(judged, name)] == queries, name


def test_the_same_call_again_reuses_everything(
    judged: Path, settings: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    before, names = read(judged / "results.json"), list(all_methods(settings()))
    stamps = {path: path.stat().st_mtime_ns for path in judged.rglob("*") if path.suffix in {".jsonl", ".safetensors"}}
    pipeline.evaluate(judged, names)
    said = caplog.text
    assert all(f"evaluate: {name} (seed 0) reuses its predictions" in said for name in names)
    assert "trains" not in said
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    assert read(judged / "results.json") == before


def test_a_user_who_has_another_version_is_answered_again(
    judged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A stage's marker does not change with an update or a rollback of its users."""
    run = Path(shutil.copytree(judged, tmp_path / "run"))
    caplog.set_level(logging.INFO)
    with closing(AdapterStore(run / "users")) as store:
        user = next(user for user, tier in store.users() if tier == Tier.USERS)
        store.rollback(user)  # to the version of stage 2
    pipeline.evaluate(run, ["groups", "users", "oppu"])
    assert "users (seed 0) reuses its predictions" not in caplog.text
    assert all(f"{name} (seed 0) reuses its predictions" in caplog.text for name in ("groups", "oppu"))
    same = ("prediction", "loss", "tier")
    stages = {name: [row for row in answers(run, name) if row["user"] == user] for name in ("groups", "users")}
    assert stages["users"] and all(
        [row[key] for row in stages["users"]] == [row[key] for row in stages["groups"]] for key in same
    )
    others = [[row for row in answers(folder, "users") if row["user"] != user] for folder in (run, judged)]
    assert others[0] == others[1]
    tiers = {row["user"]: row["tier"] for row in read(run / "users.json")["users"]}
    assert (
        tiers[user] == "groups" and list(tiers.values()).count("users") == read(run / "results.json")["tiers"]["users"]
    )
    caplog.clear()
    pipeline.evaluate(run, ["users"])
    assert "users (seed 0) reuses its predictions" in caplog.text


def test_an_unknown_method_is_named(judged: Path) -> None:
    with pytest.raises(ConfigError, match="no method 'swaped'; did you mean 'swapped'"):
        pipeline.evaluate(judged, ["swaped"])


def test_variants_take_over_the_stages_of_the_run(judged: Path) -> None:
    for name in ("population-more", "groups-shared-e", "users-paper", "oppu"):
        mine = folder_of(judged, name) / "population" / "adapter_model.safetensors"
        assert mine.read_bytes() == (judged / "population" / "adapter_model.safetensors").read_bytes(), name
    groups = folder_of(judged, "users-paper") / "groups" / "groups.safetensors"
    assert groups.read_bytes() == (judged / "groups" / "groups.safetensors").read_bytes()
    assert not (folder_of(judged, "per-user-only") / "population").exists()
    assert not (folder_of(judged, "end-to-end") / "population").exists()
    assert not [path for path in (judged / "variants").iterdir() if path.name.startswith("users-no-router")]


def test_population_more_is_one_lora_on_the_tokens_of_stage_2(judged: Path, settings: Callable[..., Config]) -> None:
    more, own = folder_of(judged, "population-more"), read(judged / "groups" / "stage.json")
    assert read(more / "groups" / "stage.json")["tokens"] == own["tokens"]
    steps = [steps_of(at, "groups") for at in (judged, more)]
    assert steps[0] == steps[1] and len(steps[0]) > 1
    config = varied(settings(), all_methods(settings())["population-more"].variant)  # type: ignore[arg-type]
    assert (config.groups.experts, config.groups.rank, config.groups.constraint.kind) == (1, 12, "none")
    assert config.groups.alpha / config.groups.rank == settings().groups.alpha / settings().groups.rank
    # Who asks does not matter: the model of one expert is the same for all users.
    model = load(more, "groups")
    scores = [score(model, ["red green is"], [user], ["red", "green"]) for user in ("ann", "bob", None)]
    model.close()
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])
    trained = load(judged, "groups")
    own_scores = [score(trained, ["red green is"], [user], ["red", "green"]) for user in ("ann", "bob")]
    trained.close()
    assert not torch.equal(own_scores[0], own_scores[1])


def test_swapped_answers_with_another_users_embedding_and_adapter(judged: Path) -> None:
    users = {row["user"] for row in answers(judged, "users")}
    others = derangement(sorted(users), 0)
    assert set(others) == set(others.values()) == users and all(user != other for user, other in others.items())
    assert others == derangement(sorted(users, reverse=True), 0)
    assert len({tuple(sorted(derangement(sorted(users), seed).items())) for seed in range(10)}) > 1
    model = load(judged, "users")
    with Dataset.open(judged / "data.sqlite") as dataset:
        queries = list(dataset.queries())
    told = {row["id"]: row["loss"] for row in answers(judged, "swapped")}
    for query in queries:
        exchanged = answer_losses(model, [replace(query, user=others[query.user])])[0]
        assert told[query.id] == pytest.approx(exchanged, abs=1e-5)
        assert told[query.id] != pytest.approx(answer_losses(model, [query])[0], abs=1e-5)
    model.close()


def test_groups_shared_e_sees_the_same_rows_and_gives_everybody_the_same(judged: Path) -> None:
    folder = folder_of(judged, "groups-shared-e")
    assert steps_of(folder, "groups") == steps_of(judged, "groups")
    store = AdapterStore(folder / "users")
    assert [user for user, _ in store.users()] == [SINGLE_USER]
    store.close()
    model = load(folder, "groups")
    scores = [score(model, ["red green is"], [user], ["red", "green"]) for user in ("ann", SINGLE_USER, None)]
    model.close()
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])


def test_shuffled_moves_texts_between_users_and_leaves_queries_alone(judged: Path) -> None:
    (path,) = (judged / "variants" / "data").glob("shuffled-*.sqlite")
    with Dataset.open(judged / "data.sqlite") as real, Dataset.open(path) as shuffled:
        assert list(real.queries()) == list(shuffled.queries())
        for role in ("target", "other"):
            before, after = [
                {user.id: [(row.prompt, row.target) for row in data.history(user.id)] for user in data.users(role)}
                for data in (real, shuffled)
            ]
            assert {user: len(rows) for user, rows in before.items()} == {u: len(rows) for u, rows in after.items()}
            assert sorted(sum(before.values(), [])) == sorted(sum(after.values(), []))
        assert before != after or len(before) < 2
        moved = [user.id for user in real.users("target") if real.history(user.id) != shuffled.history(user.id)]
        assert len(moved) == 4


def test_end_to_end_spends_the_tokens_of_the_three_stages(judged: Path) -> None:
    facts = {stage: read(judged / stage / "stage.json") for stage in ("population", "groups")}
    with Dataset.open(judged / "data.sqlite") as dataset:
        histories = [dataset.history(user.id) for user in dataset.users("target")]
    users = 2 * sum(row.tokens for rows in histories for row in rows)
    joint = read(folder_of(judged, "end-to-end") / "users" / "stage.json")
    assert joint["tokens"] == facts["population"]["tokens"] + facts["groups"]["tokens"] + users
    assert joint["rows"] == facts["population"]["rows"] + facts["groups"]["rows"] + 2 * sum(map(len, histories))
    seen = steps_of(folder_of(judged, "end-to-end"), "end-to-end")
    assert sum(tokens for _, tokens in seen) == joint["tokens"]


def test_end_to_end_steps_takes_the_steps_of_stage_3(judged: Path, settings: Callable[..., Config]) -> None:
    config = settings()
    with Dataset.open(judged / "data.sqlite") as dataset:
        runner = JointTraining(TrainedRun(config, dataset, judged, 0), lambda metrics: None, equal_steps=True)
        rows = runner.rows()
        own = [user.id for user in dataset.users("target")]
        present, some = 0, [row.user for row in rows.rows(0)]
        for at in range(0, len(some), config.groups.batch_size):
            present += len({user for user in some[at : at + config.groups.batch_size] if user in own})
        wanted = fmean(2 * math.ceil(len(dataset.history(user)) / config.users.batch_size) for user in own)
        trained = read(folder_of(judged, "end-to-end-steps") / "users" / "stage.json")["rows"]
        assert trained == rows.size != read(folder_of(judged, "end-to-end") / "users" / "stage.json")["rows"]
    assert present / len(own) == pytest.approx(wanted, rel=0.25)


def test_the_released_oppu_trains_each_user_on_those_before(judged: Path) -> None:
    items = {}
    for name in ("oppu", "oppu-released"):
        store = AdapterStore(folder_of(judged, name) / "users")
        items[name] = {user: metadata["items"] for user, _, metadata, _ in store.metadata()}
        store.close()
    with Dataset.open(judged / "data.sqlite") as dataset:
        order = [(user.id, user.history) for user in dataset.users("target")]
    assert items["oppu"] == dict(order)
    sums = itertools.accumulate(history for _, history in order)
    assert items["oppu-released"] == {user: total for (user, _), total in zip(order, sums, strict=True)}
    first = order[0][0]
    same = [
        [row["loss"] for row in answers(judged, name) if row["user"] == first] for name in ("oppu", "oppu-released")
    ]
    assert same[0] == same[1]


def test_a_planted_leak_ends_the_evaluation_with_code_2(
    judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(judged, folder, ignore=shutil.ignore_patterns("variants", "results.json"))
    connection = sqlite3.connect(folder / "data.sqlite")
    connection.execute("""
        UPDATE rows SET (text, digest, item_key, prompt_key) =
            (SELECT text, digest, item_key, prompt_key FROM rows WHERE part = 'query' LIMIT 1)
        WHERE id = (SELECT id FROM rows WHERE part = 'history' LIMIT 1)""")
    connection.commit()
    connection.close()
    assert main(["evaluate", str(folder)]) == 2
    assert "its own row is in training" in capsys.readouterr().err
    assert not (folder / "results.json").exists()


def test_what_a_kill_left_unfinished_is_done_again_and_nothing_else(
    judged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    names = ["population", "groups", "groups-no-constraint", "user-majority"]
    pipeline.evaluate(judged, names)
    before, told = read(judged / "results.json"), answers(judged, "groups-no-constraint")
    (folder_of(judged, "groups-no-constraint") / "groups" / "stage.json").unlink()
    caplog.clear()
    pipeline.evaluate(judged, names)
    said = caplog.text
    assert said.count("evaluate: trains") == 1 and "evaluate: trains groups-no-constraint (seed 0)" in said
    assert answers(judged, "groups-no-constraint") == told
    assert read(judged / "results.json")["metrics"] == before["metrics"]
    assert (judged / "methods.csv").read_text(encoding="utf-8").count("\n") == 1 + len(before["metrics"])


@pytest.mark.parametrize("kind", ["rating", "generation"])
def test_ratings_and_free_text(kind: str, settings: Callable[..., Config], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for user in ("ann", "bob", "eve"):
            for at in range(9):
                output = str(1 + (at + ord(user[0])) % 5) if kind == "rating" else f"{user} likes it {at % 2}"
                row = {"user_id": user, "timestamp": at, "input": f"{user} has text {at}", "output": output}
                file.write(json.dumps(row) + "\n")
    names = ["users", "user-majority", "global-majority", "swapped", "rag-2", "pag"]
    longer = {"max_length": 96, "kind": "both" if kind == "generation" else "bm25"}
    config = settings(
        retrieval=longer,
        data={"path": str(rows)},
        task={"kind": kind, "max_new_tokens": 3},
        users={"epochs": 1},
        evaluation={"methods": names, "seeds": [0, 3] if kind == "rating" else [0]},
    )
    results = read(pipeline.run(config, tmp_path / "run") / "results.json")
    main = {"rating": "mae", "generation": "rouge1"}[kind]
    found = {row["method"]: row["value"] for row in results["metrics"] if row["metric"] == main}
    always = {"rating": ["user-majority-same", "prior"], "generation": ["lead"]}
    assert list(found) == [*names, *always[kind]]
    (variant,) = (tmp_path / "run" / "variants").glob("rag-2*")
    with_items = yaml.safe_load((variant / "config.yaml").read_text(encoding="utf-8"))
    assert with_items["compute"]["max_length"] == 96 and with_items["retrieval"]["k"] == 2
    # What is looked up does not depend on the seed, and lies there once; what is trained does.
    assert len(list((tmp_path / "run" / "variants" / "data").iterdir())) == 2
    if kind == "rating":
        by_seed = {row["method"]: row["by_seed"] for row in results["metrics"] if row["metric"] == "loss"}
        assert by_seed["swapped"][0] != by_seed["swapped"][1] and len(by_seed["pag"]) == 2
    if kind == "generation":
        # Everybody says "NAME likes it": the user's own usual title has three words of four at least.
        assert found["user-majority"] >= 0.75 > found["global-majority"]
    assert any(row["slice"] == "items-unseen-by-others" for row in results["slices"])


def test_check_says_what_can_be_resolved(settings: Callable[..., Config]) -> None:
    line = pipeline.check(settings(split={"target_users": 6, "min_history": 1}))[-1]
    assert "queries of 6 users can show a difference of 0." in line and " in accuracy (p < " in line
    assert "methods differ on 25% of the queries" in line
    few = pipeline.check(settings())[-1]
    assert few.startswith("power     9 queries of 4 users cannot show any difference: users are the unit of the test")


def test_users_int8_answers_with_the_rounded_adapters_and_leaves_the_run_as_it_was(judged: Path) -> None:
    with Dataset.open(judged / "data.sqlite") as dataset:
        users = [user.id for user in dataset.users("target")]
    exact = load(judged, "users")
    assert exact.store is not None
    try:
        theirs = score(exact, ["red small is"] * len(users), users, LABELS)
        with in_int8(judged, users) as coded:
            assert coded.store is not None and coded.store.folder != exact.store.folder
            for user in users:
                held, rounded = exact.store.get(user), coded.store.get(user)
                assert held is not None and rounded is not None and held.adapter is not None
                expected = decode(encode(held.adapter, "int8"))
                assert rounded.adapter is not None and rounded.adapter.keys() == expected.keys()
                assert all(torch.equal(rounded.adapter[name], expected[name]) for name in expected)
            ours = score(coded, ["red small is"] * len(users), users, LABELS)
    finally:
        exact.close()
    assert not torch.equal(ours, theirs) and torch.allclose(ours, theirs, atol=0.05)
    pipeline.evaluate(judged, ["users", "users-int8"])
    cost = {row["method"]: row for row in read(judged / "results.json")["cost"]}
    assert cost["users-int8"]["parameters_per_user"] == cost["users"]["parameters_per_user"]
    assert cost["users-int8"]["bytes_per_user"] < cost["users"]["bytes_per_user"]
