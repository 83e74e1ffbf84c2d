"""docs/security.md: every test that a promise names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`((?:tests/[\w/]*)?test_\w+(?:\.py)?|tests/[\w/]+)`", TEXT)))


def test_promises_name_tests() -> None:
    assert len(NAMES) > 20
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert [row for row in rows if "test" not in row.rpartition("|")[0].rpartition("|")[2]] == [
        row for row in rows if "SQLite only" in row
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_named_test_exists(name: str) -> None:
    if name.startswith("tests/"):
        assert (ROOT / name).exists()
    elif name.endswith(".py"):
        assert list((ROOT / "tests").rglob(name))
    else:
        assert any(f"def {name}(" in path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
