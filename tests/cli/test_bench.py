"""`proper bench`: help, and figures on stdout and in a file."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import typer

from proper.benchmarks import groups as groups_module
from proper.cli import bench_users
from proper.cli.app import app, main
from proper.files import read_json

EXAMPLES = (bench_users.USERS_EXAMPLES + bench_users.GROUPS_EXAMPLES).splitlines()


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_parse(example: str) -> None:
    program, bench, name, *arguments = shlex.split(example)
    assert (program, bench) == ("proper", "bench")
    group = typer.main.get_command(app).commands["bench"]  # type: ignore[attr-defined]
    group.commands[name].make_context(name, arguments)


@pytest.mark.parametrize("name", ["users", "groups"])
def test_help_has_the_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", name, "--help"]) == 0
    assert f"proper bench {name} --quick --json {name}.json" in capsys.readouterr().out


def test_figures_go_to_stdout_and_to_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups_module, "QUICK", groups_module.Size(rows=20, steps=1, repeats=1))
    path = tmp_path / "groups.json"
    assert main(["bench", "groups", "--quick", "--json", str(path), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    found = read_json(path)
    assert {"fused_over_loop", "fused_over_plain"} <= set(found["figures"])
    assert [line.split()[0] for line in out.splitlines()] == [*found["figures"], str(path)]
    assert "4 sides" in err
