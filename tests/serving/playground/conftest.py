"""The playground of a run with a template, opened in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import Browser

from tests.serving.playground.page import TEMPLATE, Playground, changed

if TYPE_CHECKING:
    from tests.serving.conftest import Running, Serve


@pytest.fixture(scope="module")
def served(serve: Serve, long_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Running:
    return serve(changed(long_run, tmp_path_factory.mktemp("page") / "tiny", **TEMPLATE))


@pytest.fixture
def opened(browser: Browser, served: Running) -> Iterator[Playground]:
    one = Playground(browser, served)
    yield one
    one.context.close()
    assert one.trouble == []
