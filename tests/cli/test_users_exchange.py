"""Users and the backbone out of a run and into another, from the command line."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from proper.cli.app import main
from proper.config import make_config
from proper.data.demo import DemoSettings, demo_config, write_demo

Output = pytest.CaptureFixture[str]
ODD = "../a/b 🦊"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, backbone_folder: Path) -> Path:
    """A run that has come as far as groups: its users are on the group tier."""
    from proper import pipeline
    from proper.adapters.store import AdapterStore, UserRecord

    folder = tmp_path_factory.mktemp("exchange")
    settings = DemoSettings(users=4, groups=2, items=(6, 7))
    raw = demo_config(write_demo(folder / "people", settings), settings)
    raw["split"] |= {"target_users": 2, "min_history": 2}
    short = {"max_tokens": 300, "epochs": 1}
    raw |= {"population": short, "groups": short | {"experts": 2, "rank": 3}, "compute": {"max_length": 64}}
    raw["backbone"] = str(backbone_folder)
    made = pipeline.run(make_config(raw), folder / "run", stages=("population", "groups"))
    store = AdapterStore(made / "users")
    record = store.get(next(user for user, _ in store.users()))
    assert record is not None
    store.put([UserRecord("ann", "groups", record.embedding), UserRecord(ODD, "groups", record.embedding)])
    store.close()
    return made


def known(run: Path) -> str:
    """A user with a history."""
    from proper.data.dataset import Dataset

    with Dataset.open(run / "data.sqlite") as dataset:
        return next(dataset.users("target")).id


def fails(capsys: Output, *arguments: str | Path) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err.removeprefix("proper: ").removesuffix("\n")


def test_out_of_a_run_and_into_a_copy(run: Path, tmp_path: Path, capsys: Output) -> None:
    out, copy = tmp_path / "out", tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("users.sqlite*"))
    assert main(["users", "export", str(run), "--user", ODD, "--out", str(out)]) == 0
    assert capsys.readouterr() == (f"{out}\n", "")
    assert main(["users", "import", str(copy), str(out)]) == 0
    assert capsys.readouterr() == (f"{ODD}\tgroups\n", "")
    assert main(["users", "import", str(copy), str(out), "--user", "bo"]) == 0
    assert capsys.readouterr() == ("bo\tgroups\n", "")
    assert main(["users", "import", str(copy), str(out), "--user", "a\tb\x1b[2J"]) == 0
    assert capsys.readouterr() == ('"a\\tb\\u001b[2J"\tgroups\n', ""), "no column and no command of a terminal"
    said = fails(capsys, "users", "import", copy, out)
    assert said == f"{copy}: has a user {ODD!r} already; --force replaces them, --user names another"


def test_a_deleted_user_is_imported_only_if_asked(run: Path, tmp_path: Path, capsys: Output) -> None:
    from proper.adapters.store import AdapterStore
    from proper.interactions.deletion import remove
    from proper.interactions.log import InteractionLog

    copy, out = Path(shutil.copytree(run, tmp_path / "copy")), tmp_path / "out"
    assert main(["users", "export", str(copy), "--user", "ann", "--out", str(out)]) == 0
    assert main(["users", "delete", str(copy), "--user", "ann"]) == 0
    capsys.readouterr()
    refused = f"{copy}: user 'ann' was deleted from it; --even-if-deleted imports the user anyway"
    assert fails(capsys, "users", "import", copy, out) == refused
    assert fails(capsys, "users", "import", copy, out, "--force") == refused
    assert (
        fails(capsys, "users", "show", copy, "--user", "ann")
        == f"--user ann: no such user in {copy / 'users'}; 'proper users list' prints all"
    )
    assert main(["users", "import", str(copy), str(out), "--even-if-deleted"]) == 0
    assert capsys.readouterr() == ("ann\tgroups\n", "")
    with closing(AdapterStore(copy / "users")) as store, closing(InteractionLog(copy / "users")) as log:
        assert store.head("ann") is not None
        with closing(sqlite3.connect(log.database.path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM interactions").fetchone()
            assert remove(store, log, "ann", 0).waits
            said = fails(capsys, "users", "import", copy, out, "--even-if-deleted")
            assert said == f"{copy}: user 'ann' is being deleted; 'proper users check {copy}' says how far"
            assert store.head("ann") is None


def test_an_export_has_all_texts_that_the_run_has_of_the_user(run: Path, tmp_path: Path, capsys: Output) -> None:
    from proper.interactions.log import InteractionLog, LogEntry

    copy, user, out = Path(shutil.copytree(run, tmp_path / "copy")), known(run), tmp_path / "out"
    log = InteractionLog(copy / "users")
    log.append("", user, [LogEntry("since then", "ü", 3.0, "7")])
    log.close()
    assert main(["users", "export", str(copy), "--user", user, "--out", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "interactions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["source"] for row in rows[:-1]} == {"run"} and {row["part"] for row in rows[:-1]} == {
        "history",
        "query",
    }
    last = rows[-1]
    assert (last["source"], last["id"], last["prompt"], last["target"]) == ("log", "7", "since then", "ü")
    assert main(["users", "import", str(copy), str(out), "--user", "again"]) == 0
    capsys.readouterr()


def test_an_adapter_and_its_backbone_for_other_servers(run: Path, tmp_path: Path, capsys: Output) -> None:
    user = known(run)
    arguments = ["users", "export", str(run), "--user", user, "--out", str(tmp_path / "ann"), "--format", "peft"]
    assert main(arguments) == 0
    assert main(["export-backbone", str(run), "--out", str(tmp_path / "backbone")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'ann'}\n{tmp_path / 'backbone'}\n"
    assert {path.name for path in (tmp_path / "ann").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "proper.json")
    }
    assert (tmp_path / "backbone" / "model.safetensors").is_file()


def test_what_is_there_is_replaced_only_if_asked(run: Path, tmp_path: Path, capsys: Output) -> None:
    out = tmp_path / "out"
    for arguments in (["users", "export", str(run), "--user", "ann"], ["export-backbone", str(run)]):
        assert main([*arguments, "--out", str(out)]) == 0
        capsys.readouterr()
        assert fails(capsys, *arguments, "--out", out) == f"{out}: exists already; --force replaces an earlier export"
        assert main([*arguments, "--out", str(out), "--force"]) == 0
        capsys.readouterr()
        shutil.rmtree(out)
        out.mkdir()
        (out / "diary.txt").write_text("mine")
        assert "is not an earlier export" in fails(capsys, *arguments, "--out", out, "--force")
        shutil.rmtree(out)


def test_unknown_users_runs_and_exports_are_named(run: Path, tmp_path: Path, capsys: Output) -> None:
    out = tmp_path / "out"
    for form in ("native", "peft"):
        said = fails(capsys, "users", "export", run, "--user", "nobody/🦊", "--out", out, "--format", form)
        assert said == f"{run / 'users'}: there is no user 'nobody/🦊'"
    said = fails(capsys, "users", "export", run, "--user", "ann", "--out", out, "--format", "peft")
    assert said == "user 'ann' has no history in this run to average the gates over"
    gone = tmp_path / "gone"
    for command in (["export-backbone", gone], ["users", "export", gone, "--user", "u"]):
        assert fails(capsys, *command, "--out", out) == f"{gone}: no such run folder"
    assert fails(capsys, "users", "import", gone, out) == f"{gone}: no such run folder"
    assert fails(capsys, "users", "import", run, gone) == f"{gone}: not an exported user (no proper.json)"
    assert not list(tmp_path.iterdir())


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def all_peft(run: Path, out: Path, *more: str) -> list[str]:
    return ["users", "export", str(run), "--all", "--format", "peft", "--out", str(out), *more]


def test_all_users_for_other_servers(run: Path, tmp_path: Path, capsys: Output) -> None:
    """The layouts that the documentation of vLLM, SGLang and Ray Serve LLM describes, with PEFT as the loader."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from proper.data.dataset import Dataset

    out, single, user = tmp_path / "all", tmp_path / "single", known(run)
    assert main(all_peft(run, out, "--served-at", "/lora/", "--base", "merged")) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{out}\n"
    assert "4 adapters of rank 16 (4 new), 2 users without a history left out" in captured.err
    assert "loss of folding, 2 held-out items of 2 users: " in captured.err
    with Dataset.open(run / "data.sqlite") as dataset:
        everyone = {user.id for user in dataset.users()}
    # vLLM's --lora-modules and SGLang's --lora-paths: NAME=PATH.
    modules = dict(line.split("=", 1) for line in lines(out / "lora-modules.txt"))
    assert modules == {name: f"/lora/adapters/{name}" for name in everyone}
    # POST /v1/load_lora_adapter of vLLM and /load_lora_adapter of SGLang: exactly these keys.
    requests = [json.loads(line) for line in lines(out / "load-requests.jsonl")]
    assert requests == [{"lora_name": name, "lora_path": path} for name, path in modules.items()]
    # vLLM's filesystem resolver and Ray Serve LLM: a folder per adapter; the resolver compares the base model's name.
    assert {path.name for path in (out / "adapters").iterdir()} == everyone
    for name in everyone:
        config = json.loads((out / "adapters" / name / "adapter_config.json").read_text())
        assert (config["peft_type"], config["base_model_name_or_path"], config["r"]) == ("LORA", "merged", 16)
    users = {row["user"]: row for row in map(json.loads, lines(out / "users.jsonl"))}
    assert users.keys() == everyone | {"ann", ODD}
    assert {row.get("reason") for row in users.values()} == {None, "no history in the run's data"}
    facts = json.loads((out / "proper.json").read_text())
    assert (facts["complete"], facts["adapters"], facts["skipped"]) == (True, 4, 2)
    assert facts["loss_of_folding"]["users"] == 2
    # The same bytes as an export of one user, and PEFT loads them on the exported backbone.
    assert main(["users", "export", str(run), "--user", user, "--out", str(single), "--format", "peft"]) == 0
    assert main(["export-backbone", str(run), "--out", str(tmp_path / "backbone")]) == 0
    capsys.readouterr()
    weights = "adapter_model.safetensors"
    assert (out / "adapters" / user / weights).read_bytes() == (single / weights).read_bytes()
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "backbone"), out / "adapters" / user
    )
    loaded = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(loaded) == len(load_file(out / "adapters" / user / weights))


def test_an_export_of_all_users_is_completed_and_kept_up_to_date(run: Path, tmp_path: Path, capsys: Output) -> None:
    from proper.adapters.store import AdapterStore

    copy, out = Path(shutil.copytree(run, tmp_path / "copy")), tmp_path / "all"
    assert main(all_peft(copy, out)) == 0
    first, second, *others = sorted(path.name for path in (out / "adapters").iterdir())
    before = (out / "adapters" / second / "adapter_model.safetensors").stat()
    shutil.rmtree(out / "adapters" / first)  # as if it had been interrupted before this user
    capsys.readouterr()
    assert main(all_peft(copy, out)) == 0
    assert "4 adapters of rank 16 (1 new)" in capsys.readouterr().err
    assert (out / "adapters" / second / "adapter_model.safetensors").stat() == before
    with closing(AdapterStore(copy / "users")) as store:
        record = store.get(first)
        assert record is not None
        store.put([record])  # a new version
        store.delete(second)
    assert main(all_peft(copy, out)) == 0
    said = capsys.readouterr().err
    assert "3 adapters of rank 16 (1 new)" in said and "1 adapters removed" in said
    assert sorted(path.name for path in (out / "adapters").iterdir()) == [first, *others]
    assert sorted(line.split("=")[0] for line in lines(out / "lora-modules.txt")) == [first, *others]


def test_an_export_of_all_users_needs_a_folder_of_its_own(run: Path, tmp_path: Path, capsys: Output) -> None:
    out = tmp_path / "out"
    assert fails(capsys, "users", "export", run, "--out", out) == "export needs --user ID or --all"
    assert fails(capsys, *all_peft(run, out, "--user", "ann")) == "--user and --all exclude each other"
    assert fails(capsys, *all_peft(run, out, "--force")).startswith("--force goes with --user")
    said = fails(capsys, "users", "export", run, "--all", "--out", out)
    assert said.startswith("--all needs --format peft")
    said = fails(capsys, "users", "export", run, "--user", "ann", "--out", out, "--base", "x")
    assert said == "--served-at and --base go with --all"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    said = fails(capsys, *all_peft(run, out))
    assert said == f"{out}: exists already and is not an export of all users; name another folder"
    assert [path.name for path in out.iterdir()] == ["diary.txt"]
