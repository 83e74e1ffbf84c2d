"""The wheel has every file of the package and nothing else, and works in a fresh environment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import proper

ROOT = Path(__file__).parents[1]
INFO = f"proper_llm-{proper.__version__}.dist-info"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.iterdir()
    return path


def test_the_wheel_has_the_package_s_files_and_nothing_else(wheel: Path) -> None:
    sources = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "proper").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    for needed in ("py.typed", "serving/page/index.html", "models/nano/model.safetensors", "reports/report.html.j2"):
        assert f"proper/{needed}" in names
    assert {name for name in names if not name.startswith(INFO)} == sources
    assert f"{INFO}/licenses/LICENSE" in names


def test_the_wheel_s_metadata_name_version_extras_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        metadata = Parser().parsestr(opened.read(f"{INFO}/METADATA").decode())
        scripts = opened.read(f"{INFO}/entry_points.txt").decode()
    assert (metadata["Name"], metadata["Version"]) == ("proper-llm", proper.__version__)
    assert metadata["Requires-Python"] == ">=3.11"
    assert {"data", "serve", "dev"} <= set(metadata.get_all("Provides-Extra", []))
    assert "proper = proper.cli.app:entry" in scripts


def test_the_description_on_a_package_index_has_no_relative_links(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        text = Parser().parsestr(opened.read(f"{INFO}/METADATA").decode()).get_payload()
    assert isinstance(text, str) and text.startswith("# proper\n")
    assert "https://aclanthology.org" in text and "`docs/serving.md`" in text
    assert not re.findall(r"\]\((?!https?://)", text)
    assert "<!--" not in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_runs_the_demo_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "-q"]
    subprocess.run([*install, str(wheel)], check=True)
    (packages,) = (home / "lib").glob("python*/site-packages")
    # The dependencies come from this environment, after the new one's own folder; its .pth files are not read.
    here = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(here))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = [str(python), "-c", "import proper; print(proper.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).is_relative_to(packages)
    command = [str(home / "bin" / "proper"), "demo", "--users", "24", "--out", "run"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("run/report.html\n") and (tmp_path / "run" / "results.json").is_file()
