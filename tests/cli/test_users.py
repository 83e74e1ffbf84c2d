"""`proper users`: what it prints, what it changes, and what it says to what it cannot do."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
import typer

from proper.adapters.store import AdapterStore, UserRecord
from proper.cli.app import app, main

Output = pytest.CaptureFixture[str]
ODD = "../ü\n🎈"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with four users; u7 has two versions."""
    folder = tmp_path / "a-run"
    folder.mkdir()
    (folder / "config.yaml").write_text("data: {path: x}\n")
    store = AdapterStore(folder / "users")
    adapter = {"x.A": torch.ones(2, 3), "x.B": torch.zeros(4, 2)}
    store.put(
        [
            UserRecord("u7", "users", torch.zeros(2), adapter, {"passes": 1}),
            UserRecord("u8", "users", torch.zeros(2), {name: 2 * tensor for name, tensor in adapter.items()}),
            UserRecord("u9", "groups", torch.zeros(2), None, {"reason": "größer"}),
            UserRecord(ODD, "groups", torch.zeros(2)),
        ]
    )
    store.put([UserRecord("u7", "users", torch.zeros(2), {"x.A": torch.ones(1)}, {"passes": 3})])
    store.close()
    return folder


def prints(capsys: Output, *arguments: str, code: int = 0) -> list[str]:
    """Run a command of `proper users`; return the lines on stdout."""
    assert main(["users", *arguments]) == code
    return capsys.readouterr().out.splitlines()


def fails(capsys: Output, *arguments: str) -> str:
    assert main(["users", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("proper: ") and err.count("\n") == 1
    return err.removeprefix("proper: ").rstrip()


def test_list(capsys: Output, run: Path) -> None:
    lines = prints(capsys, "list", str(run))
    assert lines == ['"../ü\\n🎈"\tgroups\t8', "u7\tusers\t12", "u8\tusers\t64", "u9\tgroups\t8"]
    told = [json.loads(line) for line in prints(capsys, "list", str(run), "--json")]
    assert [each["user"] for each in told] == [ODD, "u7", "u8", "u9"]
    assert told[3] == {"user": "u9", "tier": "groups", "bytes": 8, "facts": {"reason": "größer"}}


def test_show(capsys: Output, run: Path) -> None:
    lines = prints(capsys, "show", str(run), "--user", "u7")
    assert lines[0] == "user u7: tier users (own embedding and adapter), version 2, 12 bytes"
    assert [line for line in lines if line.startswith("  version")][0].startswith("  version 2 (current): tier users")
    (line,) = prints(capsys, "show", str(run), "--user", ODD, "--json")
    told = json.loads(line)
    assert told["user"] == ODD and [each["version"] for each in told["versions"]] == [1]
    assert not (run / "users" / "interactions.sqlite").exists(), "asking leaves nothing behind"


def passes(capsys: Output, run: Path) -> int:
    """The metadata of the current version of u7."""
    (line,) = prints(capsys, "show", str(run), "--user", "u7", "--json")
    return int(json.loads(line)["versions"][0]["facts"]["passes"])


def test_rollback(capsys: Output, run: Path) -> None:
    assert prints(capsys, "rollback", str(run), "--user", "u7") == ["version 3 is current"]
    assert passes(capsys, run) == 1
    assert prints(capsys, "rollback", str(run), "--user", "u7", "--version", "2") == ["version 4 is current"]
    assert passes(capsys, run) == 3
    said = fails(capsys, "rollback", str(run), "--user", "u7", "--version", "9")
    assert said == "--user u7: cannot be rolled back; version 4 is current and earlier ones are 3"
    assert fails(capsys, "rollback", str(run), "--user", "u8").endswith("there are no earlier ones")


def test_delete(capsys: Output, run: Path) -> None:
    assert "no such user" in fails(capsys, "delete", str(run), "--user", "u8", "--user", "nobody")
    assert len(prints(capsys, "list", str(run))) == 4, "all of them or none"
    assert prints(capsys, "delete", str(run), "--user", "u8", "--user", ODD, "--user", "u8") == ["2 deleted"]
    assert [line.split("\t")[0] for line in prints(capsys, "list", str(run))] == ["u7", "u9"]


def test_check(capsys: Output, run: Path) -> None:
    assert main(["users", "check", str(run)]) == 0
    assert capsys.readouterr() == ("", "no damage found\n")
    (path,) = (run / "users" / "blobs").iterdir()
    path.write_bytes(b"\xff" * path.stat().st_size)
    (run / "users" / "blobs" / "stray").write_bytes(b"x")
    found = [json.loads(line) for line in prints(capsys, "check", str(run), "--json", code=1)]
    assert [each["kind"] for each in found] == ["flipped", "flipped", "flipped", "orphan-file"]
    lines = prints(capsys, "check", str(run), "--repair")
    assert lines[0].startswith("user 'u7', version 2: ") and lines[0].endswith("; went back to the group tier")
    assert prints(capsys, "check", str(run)) == []
    assert prints(capsys, "list", str(run))[1] == "u7\tgroups\t8"


@pytest.mark.parametrize("command", ["show", "rollback", "delete", "update", "archive --out a.zip"])
def test_an_unknown_user_is_named(capsys: Output, run: Path, command: str) -> None:
    assert (
        fails(capsys, *command.split(), str(run), "--user", "u77")
        == f"--user u77: no such user in {run}/users; 'proper users list' prints all"
    )
    assert not (run / "users" / "interactions.sqlite").exists(), "nothing is made for a user who is not there"


@pytest.mark.parametrize("command", ["list", "show", "rollback", "delete", "check"])
def test_a_folder_without_users_is_named(capsys: Output, tmp_path: Path, command: str) -> None:
    more = [] if command in ("list", "check") else ["--user", "u"]
    hint = f"run: proper run CONFIG --out {tmp_path}"
    said = fails(capsys, command, str(tmp_path), *more)
    assert said == f"{tmp_path}: not a run folder (config.yaml is missing); {hint}"
    (tmp_path / "config.yaml").write_text("data: {path: x}\n")
    said = fails(capsys, command, str(tmp_path), *more)
    assert said == f"{tmp_path}: stage 'groups' is not trained yet; {hint}"
    assert not (tmp_path / "users").exists(), "asking leaves nothing behind"


@pytest.mark.parametrize("group", ["users", "bench"])
def test_every_command_has_help_with_examples_that_parse(capsys: Output, group: str) -> None:
    commands = typer.main.get_command(app).commands[group].commands  # type: ignore[attr-defined]
    assert main([group, "--help"]) == 0
    assert "..." not in capsys.readouterr().out.partition("Commands:")[2]
    for name in commands:
        assert main([group, name, "--help"]) == 0
        examples = [line.strip() for line in capsys.readouterr().out.partition("Examples:\n")[2].splitlines()]
        assert examples
        for example in examples:
            program, said_group, said_name, *arguments = shlex.split(example.partition(">")[0])
            assert (program, said_group, said_name) == ("proper", group, name)
            commands[name].make_context(name, arguments)
