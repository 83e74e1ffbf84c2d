"""What all tests share. Imports nothing of `proper`: the shape checks are hooked in when it is first imported."""

from __future__ import annotations

import os
import shutil

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
