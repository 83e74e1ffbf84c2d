"""What makes code another version, and what does not."""

from __future__ import annotations

import pytest

from proper.evaluation.fingerprint import bare_syntax, code_version

SOURCE = '''
"""A module."""

def area(side: float) -> float:
    """Return the area."""
    return side * side  # square
'''


def test_words_and_layout_do_not_count():
    assert bare_syntax(SOURCE) == bare_syntax("def area(side: float) -> float:\n\n    return (side * side)\n")


@pytest.mark.parametrize("change", [("side * side", "side + side"), ("area", "size"), ("side: float", "side: int")])
def test_code_counts(change):
    assert bare_syntax(SOURCE) != bare_syntax(SOURCE.replace(*change))


def test_rooms_and_files_have_versions():
    assert code_version("training") == code_version("training") != code_version("inference")
    assert code_version("evaluation/runner.py") != code_version("evaluation")
