"""The main job from end to end, on a handful of made-up users: files, results, resume, refusals, answers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

import proper
from proper import pipeline
from proper.cli.app import main
from proper.config import Config, load_run_config, make_config, with_chat
from proper.data.dataset import Dataset
from proper.data.demo import DemoSettings, demo_config, write_demo
from proper.errors import ConfigError, DataError, RunFolderError
from proper.interactions.personal_files import files_of
from proper.models.tokenizer import EMBEDDED, backbone_location, configured_encoder, load_tokenizer
from proper.run_folder import STAGE_METHODS, STORES, Stage
from tests.s3_server import S3Server

DOCUMENTED = (
    *("config.yaml", "results.json", "report.html", "metrics.jsonl", "routing.json", "users.json"),
    *("population/adapter_config.json", "population/adapter_model.safetensors"),
    *("groups/groups.safetensors", "users/users.sqlite", "users/router.safetensors"),
)
DEMO = DemoSettings(users=20, items=(10, 12))


def small_config(folder: Path, preset: str | None = None, **changes: Any) -> Config:
    """A run of seconds: every stage takes a few steps."""
    path = folder / "people" / "interactions.jsonl"
    if not path.exists():
        write_demo(path.parent, DEMO)
    raw = demo_config(path, DEMO)
    raw["split"] |= {"target_users": 4, "min_history": 5}
    raw |= {
        "population": {"epochs": 1, "max_tokens": 1500},
        "groups": {"epochs": 1, "max_tokens": 3000, "experts": 3},
        "users": {"epochs": 2, "slots": 3},
        "compute": {"checkpoint_seconds": 0.2},
        "evaluation": {"methods": ["base", "population", "groups", "users"], "resamples": 200, "seeds": [0]},
    }
    for key, value in changes.items():
        raw[key] = {**raw.get(key, {}), **value}
    return make_config({**raw, "preset": preset})


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    """Results less everything that is a time."""
    kept: dict[str, Any] = json.loads(json.dumps(results))
    del kept["run"]["seconds"]
    for row in kept["cost"]:
        for key in ("train_seconds_per_user", "train_seconds", "tokens_per_second"):
            row.pop(key, None)
    return kept


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# Not of the module: a worker that steals tests leaves a module and comes back, and would train it again.
@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    return pipeline.run(small_config(folder), folder / "run")


def test_a_run_leaves_the_documented_files_and_no_pickle(finished: Path) -> None:
    for name in DOCUMENTED:
        assert (finished / name).is_file(), name
    files = [path for path in finished.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in {".pt", ".pth", ".pkl", ".bin", ".tmp", ".checkpoint"}]
    assert not (finished / "users" / "work").exists()


TRIVIAL = ("global-majority", "user-majority", "user-majority-same", "prior")


def test_every_method_answers_every_query(finished: Path) -> None:
    results = read(finished / "results.json")
    assert results["schema"] == 1
    assert {row["method"] for row in results["metrics"]} == {*STAGE_METHODS, *TRIVIAL}
    counts = {
        method: (finished / "predictions" / f"{method}.jsonl").read_text(encoding="utf-8").count("\n")
        for method in ("base", "population", "groups", "users")
    }
    assert set(counts.values()) == {results["task"]["queries"]}
    assert results["truth"]["allowed"]["users"] > results["truth"]["allowed"]["population"]
    assert results["tiers"]["groups"] + results["tiers"]["users"] == 4
    primary = [row for row in results["comparisons"] if row["family"] == "primary"]
    assert [(row["method"], row["against"]) for row in primary] == [("groups", "population"), ("users", "groups")]


def test_a_run_whose_target_users_were_all_deleted_cannot_be_evaluated(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    with Dataset.open(run / "data.sqlite") as dataset:
        targets = [word for user in dataset.users("target") for word in ("--user", user.id)]
    assert main(["users", "delete", str(run), *targets]) == 0
    said = "no query is left, since all target users were deleted; nothing is evaluated"
    with pytest.raises(DataError, match=said):
        pipeline.evaluate(run)
    with pytest.raises(DataError, match=said):
        pipeline.run(small_config(finished.parent), run)


def test_the_same_call_again_trains_nothing_and_says_the_same(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = read(finished / "results.json")
    written = {stage: (finished / stage / "stage.json").stat().st_mtime_ns for stage in Stage}
    config = small_config(finished.parent)
    os.utime(config.data.path)  # as if rows had been added
    pipeline.run(config, finished)
    assert f"{config.data.path}: has changed since this run read it; the run keeps the rows" in caplog.text
    assert written == {stage: (finished / stage / "stage.json").stat().st_mtime_ns for stage in Stage}
    assert without_times(read(finished / "results.json")) == without_times(before)


def test_the_results_have_the_slices_that_the_config_names(finished: Path) -> None:
    config = small_config(finished.parent, evaluation={"slices": ["bottom-100"]})
    pipeline.run(config, finished, stages=["evaluate"])
    assert {row["slice"] for row in read(finished / "results.json")["slices"]} == {"bottom-100"}
    pipeline.run(small_config(finished.parent), finished, stages=["evaluate"])
    assert len({row["slice"] for row in read(finished / "results.json")["slices"]}) > 1


def test_what_holds_personal_data_is_the_owners_alone(finished: Path) -> None:
    folders = [finished, finished / "users", finished / "users" / "blobs", finished / "predictions"]
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}
    personal = {path for pattern in STORES for path in finished.glob(pattern)}
    personal |= {path for _, path in files_of(finished)}
    names = {path.name for path in personal}
    assert {"users.sqlite", "users.jsonl", "users.json", "data.sqlite", "report.html"} <= names
    assert {path for path in personal if path.is_file() and path.stat().st_mode & 0o777 != 0o600} == set()


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(finished: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load((finished / "config.yaml").read_text(encoding="utf-8"))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(raw), encoding="utf-8")
    command = [sys.executable, "-m", "proper", "run", str(config), "--out", str(tmp_path / "run")]
    # Not before there is something to lose: once while stage 2 trains, once while stage 3 does.
    for stage in ("groups", "users"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(tmp_path / "run" / "metrics.jsonl", f'"stage": "{stage}"', process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "run" / "results.json").exists()
    assert subprocess.run(command, check=False, capture_output=True, timeout=240).returncode == 0
    assert without_times(read(tmp_path / "run" / "results.json")) == without_times(read(finished / "results.json"))
    for method in ("population", "groups", "users"):
        name = f"predictions/{method}.jsonl"
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()


def wait_for(path: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 200
    while not (path.exists() and text in path.read_text(encoding="utf-8")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_folder_of_another_config_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = small_config(finished.parent, groups={"experts": 4})
    with pytest.raises(RunFolderError, match="groups.experts is 3 there and 4 here"):
        pipeline.run(other, finished)


def test_a_run_stores_whether_it_uses_the_backbones_chat_template(finished: Path, tmp_path: Path) -> None:
    assert yaml.safe_load((finished / "config.yaml").read_text(encoding="utf-8"))["data"]["chat"] == "off"
    backbone = shutil.copytree(backbone_location(EMBEDDED), tmp_path / "chatty")
    tokenizer: Any = load_tokenizer(EMBEDDED)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(backbone)
    config = small_config(finished.parent).model_copy(update={"backbone": str(backbone)})
    folder = pipeline.run(config, tmp_path / "run", stages=["population"])
    assert yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["data"]["chat"] == "on"
    prompt = configured_encoder(load_run_config(folder / "config.yaml")).prompt("Hello")
    assert tokenizer.decode(prompt, skip_special_tokens=True) == "user: Hello\nassistant:"
    pipeline.run(config, folder, stages=["population"])
    with pytest.raises(RunFolderError, match="data.chat is 'on' there and 'off' here"):
        pipeline.run(with_chat(config, "off"), folder)


def test_a_folder_that_is_no_run_is_refused(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RunFolderError, match="is not empty and not a run folder"):
        pipeline.run(small_config(finished.parent), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


@pytest.mark.parametrize(
    ("change", "stores", "said", "exists"),
    [
        ({}, ["postgresql://nobody@127.0.0.1:1/x"], "refused", False),
        ({}, ["{postgresql}", "s3://no-such-bucket/run"], "no such bucket", True),
        ({"backbone": "no-such-model"}, [], "no-such-model", True),
        ({"data": {"user": "somebody"}}, [], "no column 'somebody'", False),
        ({"data": {"user": "somebody"}}, ["{postgresql}", "s3://{bucket}/run"], "no column 'somebody'", True),
        ({"groups": {"target_modules": ["nothing"]}}, [], "matches ['nothing']", False),
        ({"groups": {"target_modules": ["nothing"]}}, ["{postgresql}", "s3://{bucket}/run"], "['nothing']", True),
    ],
)
def test_bad_input_leaves_nothing_behind(
    change: dict[str, Any],
    stores: list[str],
    said: str,
    exists: bool,
    tmp_path: Path,
    postgresql: str,
    s3: S3Server,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raw = small_config(tmp_path).model_dump()
    for key, value in change.items():
        raw[key] = value if isinstance(value, str) else raw[key] | value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw), "utf-8")
    out, bucket = tmp_path / "runs" / "notes", s3.new_bucket(versioned=True)
    if exists:
        out.mkdir(parents=True)
    words = [word for url in stores for word in ("--store", url.format(postgresql=postgresql, bucket=bucket))]
    with psycopg.connect(postgresql, autocommit=True) as database:
        schemas = "SELECT nspname FROM pg_namespace ORDER BY nspname"
        before = database.execute(schemas).fetchall()
        assert main(["run", str(tmp_path / "config.yaml"), "--out", str(out), *words]) > 0
        assert said in capsys.readouterr().err
        assert database.execute(schemas).fetchall() == before
    assert s3.contents(bucket) == {}
    assert {path.name for path in tmp_path.iterdir()} == {"people", "config.yaml", *(["runs"] if exists else [])}
    assert not exists or list(out.iterdir()) == []


def test_unknown_stages_and_methods_are_named(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no stage 'group'; did you mean 'groups'"):
        pipeline.run(small_config(finished.parent), tmp_path / "run", stages=["group"])
    with pytest.raises(ConfigError, match="no method 'grups'; did you mean 'groups'"):
        pipeline.evaluate(finished, ["grups"])


def test_methods_that_the_data_cannot_have_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    for name in ("swapped", "shuffled"):
        config = small_config(tmp_path, split={"target_users": 1}, evaluation={"methods": ["users", name]})
        for refused in (lambda c=config: pipeline.check(c), lambda c=config: pipeline.run(c, tmp_path / "run")):
            with pytest.raises(DataError, match=f"^evaluation.methods: '{name}' needs at least 2 target users; this"):
                refused()
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match="selects no rows .*; set it to all, or lower split.target_users"):
        pipeline.check(small_config(tmp_path, "paper", split={"target_users": 20}))
    with pytest.raises(ConfigError, match="'lead' answers with words of the input"):
        pipeline.check(small_config(tmp_path, evaluation={"methods": ["lead"]}))


def test_a_template_whose_line_break_was_not_read_is_named(tmp_path: Path) -> None:
    """In single quotes YAML keeps the backslash: the model would be trained on it, and nothing said so."""
    config = small_config(tmp_path, data={"prompt": r"{input}\nAnswer:"})
    note = "note      data.prompt has a backslash and an n instead of a line break: YAML needs double quotes for that"
    assert note in pipeline.check(config)
    assert not any("backslash" in line for line in pipeline.check(small_config(tmp_path)))


def test_a_stage_without_its_predecessor_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="stage 'population' is not trained yet"):
        pipeline.run(small_config(finished.parent), tmp_path / "run", stages=["groups"])


def on(backbone: Path, config: Config) -> Config:
    """The same run on a tiny Llama with random weights, which is faster and learns nothing."""
    return config.model_copy(update={"backbone": str(backbone)})


def test_seeds_are_repeats_in_folders_of_their_own(backbone_folder: Path, tmp_path: Path) -> None:
    two, one = (
        on(backbone_folder, small_config(tmp_path, evaluation={"seeds": seeds, "methods": ["population", "groups"]}))
        for seeds in ([0, 7], [0])
    )
    out = pipeline.run(two, tmp_path / "run", stages=["population", "groups", "evaluate", "report"])
    alone = pipeline.run(one, tmp_path / "alone", stages=["population", "groups"])
    results = read(out / "results.json")
    assert results["run"]["seeds"] == [0, 7]
    with pytest.raises(RunFolderError, match="stage 'users' is not trained yet"):
        pipeline.evaluate(out, ["base", "users"])
    assert not (out / "predictions" / "base.jsonl").exists()
    assert (out / "seeds" / "7" / "predictions" / "groups.jsonl").is_file()
    first = (out / "groups" / "groups.safetensors").read_bytes()
    assert first == (alone / "groups" / "groups.safetensors").read_bytes()
    assert first != (out / "seeds" / "7" / "groups" / "groups.safetensors").read_bytes()


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_presets_run_to_the_report(backbone_folder: Path, tmp_path: Path, preset: str) -> None:
    out = pipeline.run(on(backbone_folder, small_config(tmp_path, preset)), tmp_path / "run")
    assert (out / "report.html").is_file()
    results = read(out / "results.json")
    assert results["routing"]["experts"] == 3
    assert {row["method"] for row in results["metrics"]} == {*STAGE_METHODS, *TRIVIAL}
    if preset == "released":
        # A table per module with D = I: the sum of all inputs of the FFN's modules in both layers.
        cost = next(row for row in results["cost"] if row["method"] == "groups")
        assert cost["parameters_per_user"] == 2 * (32 + 32 + 48)


def test_generate_answers_known_unknown_and_mixed_users(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    user = read(finished / "users.json")["users"][0]["user"]
    prompt = "The bank wrote about the rent.\nTag:"
    assert main(["generate", str(finished), "--user", user, "--prompt", prompt, "--max-new-tokens", "4"]) == 0
    known = capsys.readouterr()
    model = proper.load(finished)
    assert [known.out.strip()] == model.generate([prompt], user_ids=[user], max_new_tokens=4)
    model.close()
    assert main(["generate", str(finished), "--user", "nobody", "--prompt", prompt, "--max-new-tokens", "4"]) == 0
    unknown = capsys.readouterr()
    assert "none" in unknown.err
    mixed = tmp_path / "mixed.jsonl"
    lines = [{"user_id": user, "prompt": prompt}, {"user_id": "nobody", "prompt": prompt}]
    mixed.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert main(["generate", str(finished), "--input", str(mixed), "--max-new-tokens", "4"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(answer["user_id"], answer["tier"] == "none") for answer in answers] == [(user, False), ("nobody", True)]
    assert [answer["output"] for answer in answers] == [known.out.strip(), unknown.out.strip()]


@pytest.mark.slow
def test_a_run_with_privacy_says_its_epsilon_everywhere(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "privacy": {"noise_multiplier": 2.0, "users_per_step": 8},
        "population": {"max_tokens": None},
        "groups": {"max_tokens": None},
    }
    config = small_config(tmp_path, **changes)
    line = pipeline.check(config)[-1]
    run = pipeline.run(config, tmp_path / "run")
    told = read(run / "results.json")["run"]["privacy"]
    assert line.startswith(f"privacy: epsilon {told['epsilon']:.2f} at delta 1e-05 for a user, over stages 1 and 2: ")
    assert told["noise_multiplier"] == 2.0 and told["groups"]["users"] == 20
    assert f"epsilon {told['epsilon']:.2f}" in (run / "report.html").read_text(encoding="utf-8")
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {step["stage"] for step in steps if "users" in step} >= {"population", "groups"}
