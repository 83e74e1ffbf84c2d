"""A JSON file of a run whose keys are used is read whole or named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proper.errors import RunFolderError
from proper.json_records import NUMBER, read_record


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("", "not readable as JSON"),
        ('{"seconds": 1', "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ("1" * 5_000, "not readable as JSON"),
        ("[]", "holds a list, not a JSON object"),
        ("null", "holds a NoneType, not a JSON object"),
        ("{}", "key 'seconds' is missing"),
        ('{"seconds": "1"}', "key 'seconds' has a wrong value"),
        ('{"seconds": true}', "key 'seconds' has a wrong value"),
    ],
)
def test_what_cannot_be_used_is_named_with_what_to_do(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "stage.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RunFolderError, match=rf"stage\.json: {said}.*; train it again$"):
        read_record(path, "train it again", seconds=NUMBER)


def test_a_key_that_may_be_null_has_to_be_there(tmp_path: Path) -> None:
    path = tmp_path / "moving.json"
    path.write_text('{"from": null}')
    with pytest.raises(RunFolderError, match="key 'to' is missing"):
        read_record(path, **{"from": type(None), "to": type(None)})  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [1, 1.5])
def test_what_can_be_used_is_returned(tmp_path: Path, seconds: Any) -> None:
    path = tmp_path / "stage.json"
    path.write_text(f'{{"seconds": {seconds}, "more": null}}')
    assert read_record(path, seconds=NUMBER) == {"seconds": seconds, "more": None}
