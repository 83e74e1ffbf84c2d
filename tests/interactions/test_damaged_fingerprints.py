"""Files of fingerprints and of originals that are damaged are named, so that a search never passes without them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from proper.errors import InputError
from proper.interactions.fingerprints import Fingerprints, add_originals, read_fingerprints, write_fingerprints

USER, SALT = "anna-17", bytes(range(32))


@pytest.mark.parametrize("salt", [None, [], "x", "0"])
def test_a_damaged_salt_is_named(tmp_path: Path, salt: object) -> None:
    path = tmp_path / "prints.json"
    write_fingerprints(path, {USER: Fingerprints(SALT)}, SALT)
    path.write_text(json.dumps({**json.loads(path.read_text()), "salt": salt}))
    for act in (lambda: read_fingerprints(path, USER), lambda: write_fingerprints(path, {}, SALT)):
        with pytest.raises(InputError, match=r"prints\.json: key 'salt' is damaged"):
            act()


@pytest.mark.parametrize("prints", [None, "x", [[]], [["text", 1, 2, 3, 4]], [["text", 1, 2, 3, 4, None]]])
def test_damaged_prints_are_named(tmp_path: Path, prints: object) -> None:
    path = tmp_path / "prints.json"
    write_fingerprints(path, {USER: Fingerprints(SALT)}, SALT)
    content = json.loads(path.read_text())
    (entry,) = content["users"].values()
    entry["prints"] = prints
    path.write_text(json.dumps(content))
    for act in (
        lambda: read_fingerprints(path, USER),
        lambda: write_fingerprints(path, {USER: Fingerprints(SALT)}, SALT),
    ):
        with pytest.raises(InputError, match=r"prints\.json: users: \w+: prints"):
            act()


@pytest.mark.parametrize(
    "damage", [lambda content: content[:60] + b"\xff" * 40 + content[100:], lambda content: content[:50]]
)
def test_originals_that_cannot_be_unpacked_are_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "anna.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", "".join(json.dumps({"input": f"text {n * n}"}) + "\n" for n in range(99)))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"anna\.zip: cannot be read as originals"):
        add_originals(Fingerprints(SALT), path, [USER])
