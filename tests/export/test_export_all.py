"""Names of exported adapters: safe for shells, paths and servers, and different for different users."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from proper.export.export_all import adapter_name

IDS = st.one_of(st.text(max_size=200), st.from_regex(r"[a-z._-]{1,4}", fullmatch=True))


@given(users=st.sets(IDS, max_size=20))
def test_names_are_safe_and_different(users: set[str]) -> None:
    names = {adapter_name(user) for user in users}
    assert len(names) == len(users)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name)


def test_plain_ids_stay_and_nobody_can_take_a_hashed_name() -> None:
    assert adapter_name("u001") == "u001"
    odd = adapter_name("../a/b")
    assert odd.startswith("user-") and len(odd) == 37
    assert adapter_name(odd) != odd
