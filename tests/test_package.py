"""The package's face: what `import proper` offers and what it costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path

import pytest
import yaml

import proper
from proper.cli.serve import watching


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


def test_the_worker_runs_nothing_from_the_folder_it_is_started_in(tmp_path: Path) -> None:
    for name in ("typer", "xxhash", "torch", "proper", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    *python, _, _, _, _, _, _ = watching(tmp_path)
    done = subprocess.run([*python, "users", "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "proper users" in done.stdout and not (tmp_path / "ran").exists(), done.stderr


def test_every_python_that_is_started_has_a_safe_path() -> None:
    root, found = Path(__file__).parents[1], []
    for path in (*(root / "src").rglob("*.py"), *(root / "scripts").rglob("*.py"), *(root / "recipes").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.List | ast.Tuple) and node.elts and ast.unparse(node.elts[0]) == "sys.executable":
                found.append((path.name, ast.unparse(node.elts[1])))
    # -I implies -P.
    assert found and {second for _, second in found} <= {"'-P'", "'-I'"}, found


@pytest.mark.parametrize("code", ["import proper", "from proper.cli.app import main; main(['run', '--help'])"])
def test_importing_and_asking_for_help_load_nothing_heavy(code: str) -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'peft', 'numpy', 'pandas', 'sklearn', 'matplotlib'}"
    check = f"import sys; {code}; sys.exit(str(sorted({heavy} & set(sys.modules)) or ''))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == "\n"
    assert done.returncode == 1  # sys.exit of an empty text


ROOT = Path(__file__).parents[1]


def test_citation_and_release_note_are_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == proper.__version__
    assert (ROOT / "docs" / "releases" / f"{proper.__version__}.md").is_file()


def test_the_workflow_tests_the_declared_pythons_and_calls_targets_that_exist() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    pythons = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["classifiers"]
    assert [f"Programming Language :: Python :: {each}" for each in pythons] == [
        each for each in classifiers if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", each)
    ]
    calls = [step["run"].split() for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    called = {words[1] for words in calls if words[0] == "make"}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"lint", "unit", "docs", "wheel"} <= called <= targets
    for words in calls:
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))


@pytest.mark.parametrize("form", ["bug_report", "feature_request"])
def test_issue_forms_have_what_github_requires(form: str) -> None:
    path = ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml"
    parsed = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert parsed["name"] and parsed["description"]
    fields = [field for field in parsed["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
