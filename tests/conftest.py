"""What all tests share. Imports nothing of `proper`: the shape checks are hooked in when it is first imported."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings

# Before any test imports the Hugging Face libraries, which read these once.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

# The same examples on every run: a failure in continuous integration is a failure here. Machines differ in speed.
settings.register_profile("proper", deadline=None, derandomize=True)
settings.load_profile("proper")


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of Debian's chromium; tests that need it are skipped where there is none."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed")
    return path


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Where dataclasses look for it.
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def lamp_files() -> ModuleType:
    """`tests/lamp_files.py`: made-up files in the formats of LaMP and OPPU."""
    return _load("lamp_files")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A web server of this test's own, see `tests/range_server.py`; it serves `site.folder` at `site.url`."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "site"
    folder.mkdir()
    with _load("range_server").serve(folder) as server:
        yield server
