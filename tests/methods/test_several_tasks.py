"""One run over two tasks of the same users, from training to answers, with a tiny random Llama."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import proper
from proper import pipeline
from proper.cli.app import main
from proper.config import Config
from proper.errors import ConfigError
from proper.inference.engine import Engine
from proper.inference.generate import Continuation
from proper.inference.requests import Request
from proper.inference.sampling import Sampling
from proper.methods.table import known_methods
from proper.models.checkpoints import load_tensors

LABEL = {"kind": "classification"}
TEXT = {"kind": "generation", "max_new_tokens": 4}


@pytest.fixture(scope="module")
def config(settings: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Config:
    rows = [json.loads(line) for line in Path(settings().data.path).read_text(encoding="utf-8").splitlines()]
    path = tmp_path_factory.mktemp("both") / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "author": row["user_id"]}) + "\n" for row in rows), encoding="utf-8")
    say = {"path": str(path), "user": "author", "prompt": "Say {input}:", "target": "{output} {input}"}
    tasks: dict[str, dict[str, Any]] = {
        "colour": {"data": {"path": str(path), "prompt": "{input}"}, "task": LABEL},
        "say": {"data": say, "task": TEXT},
    }
    return settings(tasks=tasks, data={**tasks["colour"]["data"]}, task=LABEL, split={"shared_items": "allow"})


@pytest.fixture(scope="module")
def finished(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.run(config, tmp_path_factory.mktemp("several") / "run")


@pytest.fixture(scope="module")
def model(finished: Path) -> Iterator[proper.Model]:
    loaded = proper.load(finished)
    yield loaded
    loaded.close()


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_results_have_rows_for_each_task(finished: Path) -> None:
    results = read(finished / "results.json")
    assert [row["name"] for row in results["tasks"]] == ["colour", "say"]
    assert results["task"]["name"] == "colour"
    metrics = {(row["task"], row["method"], row["metric"]) for row in results["metrics"]}
    for method in ("population", "groups", "users", "user-majority"):
        assert {("colour", method, "accuracy"), ("say", method, "rouge1")} <= metrics
        lines = (finished / "predictions" / f"{method}.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line)["task"] for line in lines]
        assert len(found) == sum(row["queries"] for row in results["tasks"])
        assert set(found) == {"colour", "say"}
    assert ("say", "lead", "rouge1") in metrics and ("colour", "lead", "accuracy") not in metrics
    shares = results["routing"]["tasks"]
    assert set(shares) == {"colour", "say"} and all(abs(sum(own) - 1) < 1e-5 for own in shares.values())
    assert set(read(finished / "users.json")["tasks"]) == {"colour", "say"}
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "<title>colour, say on " in page
    assert "Which experts serve which task" in page and "say: " in page


def test_a_user_with_queries_but_no_history_of_a_task_is_evaluated(config: Config, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(config.data.path).read_text(encoding="utf-8").splitlines()]
    alone = max(rows, key=lambda row: (row["user_id"] == "ann", row["timestamp"]))
    path = tmp_path / "say.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row is alone or row["user_id"] != "ann"))
    say = config.tasks["say"]
    tasks = {**config.tasks, "say": say.model_copy(update={"data": say.data.model_copy(update={"path": str(path)})})}
    run = pipeline.run(config.model_copy(update={"tasks": tasks}), tmp_path / "run")
    found = read(run / "users.json")["tasks"]["say"]["users"]
    assert {row["user"]: row["history"] for row in found}["ann"] == 0 and len(found) > 2
    metrics = read(run / "results.json")["metrics"]
    sizes = {row["metric"]: row["users"] for row in metrics if (row["task"], row["method"]) == ("say", "users")}
    assert sizes["rouge1"] == len(found) and sizes["style_distance"] == len(found) - 1


def test_one_adapter_per_user_learns_from_all_tasks(finished: Path, model: proper.Model) -> None:
    tensors, _ = load_tensors(finished / "groups" / "groups.safetensors")
    terms = {name: tensor for name, tensor in tensors.items() if name.endswith(".task")}
    assert terms and all(tensor.shape == (3, 2) for tensor in terms.values())
    metadata = {user: versions[0].metadata for user in model.users if (versions := model.users.versions(user))}
    marker = read(finished / "groups" / "stage.json")
    sizes = {row["user"]: row["history"] for row in read(finished / "users.json")["users"]}
    assert marker["rows"] > sum(sizes.values())
    for user, size in sizes.items():
        assert metadata[user]["items"] == 2 * size


def test_a_batch_of_several_tasks_is_each_row_alone(model: proper.Model) -> None:
    """Not strict: the engine serves two tasks, two users and the same prompt in one batch."""
    prompt, users = model.personalized.encoder.prompt("Say red old:"), ["ann", "bob"]

    def answer(asked: list[tuple[str, int]]) -> list[list[int]]:
        engine = Engine(model.personalized, strict=True)
        found = [Continuation() for _ in asked]
        for (user, task), sink in zip(asked, found, strict=True):
            engine.submit(Request(prompt, user, sampling=Sampling(6), task=task), sink)
        while not engine.idle:
            engine.step()
        engine.close()
        return [one.tokens for one in found]

    asked = [(user, task) for user in users for task in (0, 1, 0)]
    assert answer(asked) == [answer([each])[0] for each in asked]
    labels = ["red", "green", "blue"]
    scores = {name: model.score(["Say red old:"], ["ann"], labels, task=name) for name in (None, "colour", "say")}
    assert torch.equal(scores[None], scores["colour"]) and not torch.equal(scores["colour"], scores["say"])


def test_prefixes_of_another_task_are_not_reused(model: proper.Model) -> None:
    encoder, text = model.personalized.encoder, "red old new quiet loud round small large " * 3
    # The second prompt goes on from the first: a prompt that was asked before is computed again.
    prompts = encoder.prompt(text), encoder.prompt(text + "red old new")

    def answer(*asked: tuple[int, int]) -> tuple[list[list[int]], int]:
        engine, found = Engine(model.personalized, strict=True), []
        for task, number in asked:
            found.append(Continuation())
            engine.submit(Request(prompts[number], "ann", sampling=Sampling(6), task=task), found[-1])
            while not engine.idle:
                engine.step()
        reused = engine.stats().reused_tokens
        engine.close()
        return [one.tokens for one in found], reused

    first, second = answer((0, 0)), answer((1, 1))
    both, reused = answer((0, 0), (1, 1))
    assert both == [*first[0], *second[0]] and reused == 0
    assert answer((1, 0), (1, 1))[1] > 0


def test_the_command_names_a_task(
    finished: Path, model: proper.Model, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "asked.jsonl"
    asked = ["generate", str(finished), "--user", "ann", "--field", "input=red old"]
    assert main([*asked, "--task", "say"]) == 0
    said = capsys.readouterr().out.strip()
    assert [said] == model.generate(["Say red old:"], ["ann"], task="say")
    assert main([*asked, "--task", "sing"]) == 2
    assert "no task 'sing'; the tasks are colour, say" in capsys.readouterr().err
    path.write_text('{"author": "ann", "input": "red old"}\n{"user_id": "ann", "prompt": "Say red old:"}\n')
    assert main(["generate", str(finished), "--task", "say", "--input", str(path)]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["user_id"], row["output"]) for row in found] == [("ann", said)] * 2


def test_methods_that_choose_on_one_task_are_refused(config: Config) -> None:
    assert [one.name for one in known_methods(["oppu", "lead", "swapped"], config)] == ["oppu", "lead", "swapped"]
    for name in ("prior", "rag", "users+residual", "end-to-end"):
        with pytest.raises(ConfigError, match=f"'{name.replace('+', '.')}' needs a run of one task"):
            known_methods([name], config)
