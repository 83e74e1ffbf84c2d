"""Addresses of clusters."""

from __future__ import annotations

import pytest

from proper.cluster.address import check_address
from proper.errors import InputError


@pytest.mark.parametrize("address", ["auto", "local:1", "local:16", "ray://head:10001"])
def test_known_forms(address: str) -> None:
    assert check_address(address) == address


@pytest.mark.parametrize("address", ["", "local", "local:0", "local:-1", "local:two", "ray:/head", "http://head"])
def test_other_forms_are_refused_in_one_line(address: str) -> None:
    with pytest.raises(InputError, match=r"write auto, local:N .N >= 1. or ray://HOST:PORT$"):
        check_address(address)
