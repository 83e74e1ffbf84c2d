"""Damaged files of a run end an evaluation with code 2 and one line that names the file, and the line or the key."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from proper import pipeline
from proper.cli.app import main
from proper.models.checkpoints import load_tensors, save_tensors

PREDICTION = '{"id": 1, "user": "ann", "prompt": "p", "target": "t", "prediction": '


@pytest.fixture(scope="module")
def evaluated(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(run, folder)
    pipeline.evaluate(folder, ["population", "groups"])
    return folder


def replaced(text: str) -> Callable[[str], str]:
    return lambda _: text


def second_line(text: str) -> Callable[[str], str]:
    def change(content: str) -> str:
        first, _, *others = content.splitlines()
        return "\n".join([first, text, *others, ""])

    return change


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("predictions/groups.json", replaced("{}"), "groups.json: key 'key' is missing; remove it"),
        ("predictions/groups.json", replaced('"x"'), "groups.json: holds a str, not a JSON object; remove it"),
        ("predictions/groups.jsonl", second_line("{}"), "groups.jsonl:2: not a prediction: id: Field required"),
        ("predictions/groups.jsonl", second_line(PREDICTION), "groups.jsonl:2: not a prediction: Invalid JSON"),
        ("predictions/groups.jsonl", second_line(PREDICTION + "[]}"), "groups.jsonl:2: not a prediction: prediction:"),
        ("predictions/groups.jsonl", second_line(PREDICTION + '"\x00'), "groups.jsonl:2: not a prediction: Invalid"),
        ("predictions/groups.jsonl", replaced(""), "groups.jsonl: holds 0 of 9 predictions; remove it"),
        ("predictions/groups.jsonl", lambda text: text.partition("\n")[0] + "\n", "groups.jsonl: holds 1 of 9"),
        ("analysis.json", replaced("[]"), "analysis.json: holds a list, not a JSON object; remove it"),
        ("groups/stage.json", lambda text: text.replace("seconds", "s"), "groups/stage.json: key 'seconds' is missing"),
    ],
)
def test_a_damaged_file_is_named(
    evaluated: Path, name: str, damage: Callable[[str], str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = evaluated / name
    before, results = path.read_text(encoding="utf-8"), (evaluated / "results.json").read_bytes()
    path.write_text(damage(before), encoding="utf-8")
    try:
        assert main(["evaluate", str(evaluated), "--methods", "population,groups"]) == 2
    finally:
        path.write_text(before, encoding="utf-8")
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert (evaluated / "results.json").read_bytes() == results


def test_weights_that_lack_a_tensor_are_named(
    evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(evaluated, folder)
    path = folder / "groups" / "groups.safetensors"
    tensors, facts = load_tensors(path)
    del tensors["mean_embedding"]
    save_tensors(path, tensors, facts)
    assert main(["generate", str(folder), "--user", "ann", "--prompt", "red is"]) == 1
    assert "groups.safetensors: the tensor 'mean_embedding' is missing" in capsys.readouterr().err.splitlines()[-1]


def test_routing_that_is_gone_is_measured_again(evaluated: Path) -> None:
    path = evaluated / "routing.json"
    before = path.read_bytes()
    path.unlink()
    pipeline.evaluate(evaluated, ["groups"])
    assert path.read_bytes() == before


def test_a_run_is_evaluated_again_after_a_target_user_is_deleted(evaluated: Path, tmp_path: Path) -> None:
    folder, methods = tmp_path / "run", ["population", "groups", "global-majority"]
    shutil.copytree(evaluated, folder)
    before = pipeline.evaluate(folder, methods)["metrics"]
    assert main(["users", "delete", str(folder), "--user", "ann"]) == 0
    after = pipeline.evaluate(folder, methods)["metrics"]
    assert [row["method"] for row in after] == [row["method"] for row in before]
    assert all(new["users"] == old["users"] - 1 for new, old in zip(after, before, strict=True))
    assert all(new["queries"] < old["queries"] for new, old in zip(after, before, strict=True))
