"""`proper bench`: figures on stdout and in a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proper.benchmarks import groups as groups_module
from proper.cli.app import main
from proper.cli.bench import publish
from proper.errors import ProperError
from proper.files import read_json


def test_figures_go_to_stdout_and_to_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups_module, "QUICK", groups_module.GroupsBenchSize(rows=20, steps=1, repeats=1))
    path = tmp_path / "groups.json"
    assert main(["bench", "groups", "--quick", "--json", str(path), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    found = read_json(path)
    assert {"fused_over_loop", "fused_over_plain"} <= set(found["figures"])
    assert [line.split()[0] for line in out.splitlines()] == [*found["figures"]]
    assert "4 sides" in err


def test_figures_are_printed_where_their_file_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ProperError, match="cannot be written"):
        publish({"figures": {"users": 1}}, tmp_path)
    assert json.loads(capsys.readouterr().out) == {"figures": {"users": 1}}
