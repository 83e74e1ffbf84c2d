"""Lists of names on the command line."""

from __future__ import annotations

import pytest

from proper.cli.options import chosen
from proper.cli.serve import size_in_bytes
from proper.errors import InputError

STAGES = ("population", "groups", "users", "evaluate", "report")


def test_names_are_split_in_their_order() -> None:
    assert chosen("--stages", " groups, users,", STAGES) == ["groups", "users"]
    assert chosen("--methods", "rag,base") == ["rag", "base"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grups", "--stages: unknown name 'grups'; did you mean 'groups'?"),
        ("groups,zzz", "--stages: unknown name 'zzz'; known: population, groups, users, evaluate, report"),
        ("", "--stages: names are missing, write it as a,b"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        chosen("--stages", text, STAGES)
    assert str(caught.value) == message


def test_sizes() -> None:
    for text, size in (("0", 0), ("4096", 4096), ("64MiB", 64 << 20), ("1.5 g", 3 << 29), ("2kb", 2048)):
        assert size_in_bytes("--prefix-cache", text) == size
    for text in ("", "many", "-1", "1TB", "MiB"):
        with pytest.raises(InputError, match=r"--prefix-cache: .* is not a size, write it as 64MiB, 1GiB or 0"):
            size_in_bytes("--prefix-cache", text)
