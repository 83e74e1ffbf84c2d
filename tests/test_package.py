"""The package's face: what `import proper` offers and what it costs."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata, resources

import pytest

import proper


def test_the_face_is_small_and_stable() -> None:
    assert proper.__all__ == ["__version__", "load", "run"]
    assert set(proper.__all__) <= set(dir(proper))


def test_the_version_is_the_distribution_s() -> None:
    assert metadata.version("proper-llm") == proper.__version__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'proper' has no attribute 'rum'"):
        proper.rum  # noqa: B018


def test_the_package_says_that_it_is_typed() -> None:
    assert resources.files("proper").joinpath("py.typed").is_file()


@pytest.mark.parametrize("code", ["import proper", "from proper.cli.app import main; main(['run', '--help'])"])
def test_importing_and_asking_for_help_load_nothing_heavy(code: str) -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'peft', 'numpy', 'pandas', 'sklearn', 'plotly'}"
    check = f"import sys; {code}; sys.exit(str(sorted({heavy} & set(sys.modules)) or ''))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == "\n"
    assert done.returncode == 1  # sys.exit of an empty text
