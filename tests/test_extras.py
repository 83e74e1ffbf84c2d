"""The base distribution has what the base commands import, and a missing extra is one line that names it."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

from proper.extras import EXTRAS, MissingExtraError, needs_extra

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Distributions whose module has another name.
MODULES = {"pyyaml": "yaml", "scikit-learn": "sklearn"}
# Modules that another one is built on, so that both are always there.
PARTS = {
    "anyio": "fastapi",
    "h11": "uvicorn",
    "markupsafe": "jinja2",
    "pydantic_core": "pydantic",
    "starlette": "fastapi",
    "botocore": "boto3",
    "tokenizers": "transformers",
}
# Modules that an extra's own modules import.
OF_EXTRAS = {
    "cluster": ("cluster/",),
    "postgresql": ("databases/postgresql/",),
    "serve": ("serving/",),
    "data": ("data/arrow_files.py", "data/text_files.py"),
    "gguf": ("models/gguf_rope.py",),
    "privacy": ("training/privacy.py",),
    "s3": ("adapters/bucket.py",),
    "simulate": ("simulation/",),
}

# Hides these modules from the process it is put into, as if they were not installed.
BLOCKED = """
import sys
class Finder:
    def __init__(self, real):
        self.real = real
    def __getattr__(self, name):
        return getattr(self.real, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {names!r} else self.real.find_spec(name, path, target)
sys.meta_path[:] = map(Finder, sys.meta_path)
"""


def modules_of(requirements: list[str]) -> set[str]:
    names = {re.split(r"[^\w-]", each, maxsplit=1)[0] for each in requirements}
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


def third_parties() -> dict[str, set[str]]:
    """Return the third-party modules that the package imports, each with the files that do."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in (ROOT / "src" / "proper").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                top = name.partition(".")[0]
                top = PARTS.get(top, top)
                if top not in sys.stdlib_module_names and top != "proper":
                    found[top].add(path.relative_to(ROOT / "src" / "proper").as_posix())
    return found


def test_every_import_is_declared_and_every_dependency_is_imported() -> None:
    base, imported = modules_of(PROJECT["dependencies"]), third_parties()
    extras = {extra: modules_of(PROJECT["optional-dependencies"][extra]) for extra in EXTRAS}
    assert extras == {extra: {PARTS.get(name, name) for name in modules} for extra, modules in EXTRAS.items()}
    for module, files in imported.items():
        extra = next((name for name, modules in EXTRAS.items() if module in modules), None)
        if extra is None:
            assert module in base, f"{module} is not declared; imported by {sorted(files)}"
        else:
            assert all(file.startswith(OF_EXTRAS[extra]) for file in files), (module, files)
    assert base - set(imported) == set(), "declared and not imported"


def blocked(code: str) -> subprocess.CompletedProcess[str]:
    names = {module for modules in EXTRAS.values() for module in modules}
    return subprocess.run(
        [sys.executable, "-c", BLOCKED.format(names=names) + code],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def config(folder: Path, data: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(f"data: {data}\n")
    return str(folder / "config.yaml")


def test_each_command_names_the_extra_that_it_lacks(tmp_path: Path) -> None:
    saved, lamp, bucket = tmp_path / "saved", tmp_path / "lamp", tmp_path / "bucket"
    rows = [{"user_id": f"u{at % 2}", "input": f"text {at}", "output": "yn"[at % 3 > 0]} for at in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    private = config(
        tmp_path / "private", f"{{path: {tmp_path / 'rows.jsonl'}}}\nprivacy: {{epsilon: 8, users_per_step: 1}}"
    )
    calls = [
        ["serve", str(Path(config(tmp_path / "run", "{path: x}")).parent)],
        ["check", config(saved, f"{{path: {saved}}}")],
        ["check", config(lamp, f"{{path: {lamp}, format: lamp, task: lamp-3}}")],
        ["simulate", str(lamp / "none.yaml")],
        ["check", private],
        ["run", config(bucket, "{path: x}"), "--out", str(tmp_path / "new"), "--store", "s3://b/p"],
    ]
    for name in ("train_questions", "train_outputs", "dev_questions", "dev_outputs"):
        (lamp / f"{name}.json").write_text("[]")
    (saved / "state.json").write_text("{}")
    done = blocked(f"from proper.cli.app import main\nfor call in {calls!r}: print(main(call))\n")
    assert done.stdout.split() == ["2"] * 6, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("proper: ")] == [
        f"proper: {feature} needs the extra '{extra}': pip install 'proper-llm[{extra}]'"
        for feature, extra in (
            ("'proper serve'", "serve"),
            (f"{saved}: reading a Hugging Face dataset", "data"),
            (f"{lamp / 'train_outputs.json'}: reading a benchmark's JSON file", "data"),
            ("'proper simulate'", "simulate"),
            ("privacy (differentially private training)", "privacy"),
            ("s3://b/p/ (object storage)", "s3"),
        )
    ]


def test_without_extras_everything_else_can_be_imported() -> None:
    code = """
import importlib, pkgutil, sys, proper
def names(package):
    for each in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        apart = ("proper.cluster.user_router", "proper.databases.postgresql", "proper.__main__")
        if each.name in ("proper.serving", "proper.simulation", *apart):
            continue
        yield each.name
        if each.ispkg:
            yield from names(importlib.import_module(each.name))
for name in names(proper):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        print(name)
print({"sklearn", "pandas"} & {*sys.modules})
"""
    done = blocked(code)
    assert done.returncode == 0, done.stderr
    # Neither is imported before it is used: sklearn, which imports pandas, takes 1.5 s of CPU time.
    assert done.stdout == "set()\n"


@pytest.mark.slow
def test_the_demo_needs_no_extra(tmp_path: Path) -> None:
    arguments = ["demo", "--out", str(tmp_path / "run"), "--users", "24"]
    done = blocked(f"from proper.cli.app import main\nsys.exit(main({arguments!r}))")
    assert done.returncode == 0, done.stderr


def test_another_missing_module_is_another_error() -> None:
    with pytest.raises(ModuleNotFoundError, match="nowhere"), needs_extra("serve", "'proper serve'"):
        import nowhere  # noqa: F401
    with pytest.raises(MissingExtraError), needs_extra("data", "this"):
        raise ModuleNotFoundError(name="datasets.utils")
