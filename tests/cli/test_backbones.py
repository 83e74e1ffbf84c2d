"""`proper backbones`: what is at hand, as text and as JSON; an unknown name is one line."""

import json
from pathlib import Path

import pytest

from proper.cli.app import main


def test_the_list_names_what_is_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PROPER_CACHE", str(tmp_path))
    assert main(["backbones", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["cache"] == str(tmp_path)
    assert {one["name"]: one["folder"] for one in listed["backbones"]} == {
        "proper-nano": "in the package",
        "smollm2-135m": None,
    }
    assert main(["backbones", "list"]) == 0
    assert "not downloaded; run: proper backbones fetch smollm2-135m" in capsys.readouterr().out


def test_an_unknown_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backbones", "fetch", "llama"]) == 2
    assert capsys.readouterr().err == "proper: no backbone 'llama'; known: smollm2-135m\n"
