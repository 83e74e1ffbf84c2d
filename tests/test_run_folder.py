"""Layout of the run folder: names, stages, and that no other module spells them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from proper import run_folder
from proper.errors import InputError, RunFolderError
from proper.run_folder import Personal, RunFolder, Stage, Tier, UsersFolder, kind_of, nested_runs, require_run

SOURCE = Path(run_folder.__file__).parent
LAYOUT = Path(run_folder.__file__)
OTHERS = {("run_export.py", "interactions.jsonl"), ("archive.py", "interactions.jsonl")}
"""A file of another folder that has the same name: a user's texts in an exported archive."""


def literals(tree: ast.AST) -> Iterator[ast.Constant]:
    """Yield the string literals of a module, docstrings excluded."""
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node


def layout_names() -> tuple[set[str], set[str]]:
    """Return the file names and the folder names that `run_folder` spells."""
    parts = {part for node in literals(ast.parse(LAYOUT.read_text())) for part in re.split(r"[/*\s]+", str(node.value))}
    endings = "json|jsonl|sqlite|yaml|lock|html|csv|safetensors|checkpoint|required"
    files = {part for part in parts if re.fullmatch(rf"\w[\w.-]*\.({endings})", part)}
    fixed = [
        path for kind in (RunFolder, UsersFolder) for path in vars(kind).values() if isinstance(path, run_folder._Path)
    ]
    folders = {part for path in fixed for part in path._below.parts if "." not in part}
    return files, {*folders, *Stage, "seeds", "variants"}


def spelled(path: Path, files: set[str], folders: set[str]) -> Iterator[str]:
    """Yield the places where a module spells a name of the run folder, or a collection of all stages."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = re.compile(rf"(?<![\w.-])({'|'.join(map(re.escape, sorted(files)))})(?!\w|\.\w)")
    for node in literals(tree):
        if names.search(str(node.value)) and (path.name, node.value) not in OTHERS:
            yield f"{path}:{node.lineno}: {node.value!r}"
    # The values that a client may send are part of a schema's text.
    schemas = [node.slice for node in ast.walk(tree) if isinstance(node, ast.Subscript)]
    for node in ast.walk(tree):
        match node:
            case ast.BinOp(op=ast.Div(), right=ast.Constant(value=str(name))) if name in folders:
                yield f"{path}:{node.lineno}: / {name!r}"
            case ast.Tuple() | ast.List() | ast.Set() if node not in schemas:
                if {*Stage} <= {each.value for each in node.elts if isinstance(each, ast.Constant)}:
                    yield f"{path}:{node.lineno}: a collection of all stages"


def test_no_other_module_spells_a_name_of_the_run_folder() -> None:
    files, folders = layout_names()
    assert {"config.yaml", "stage.json", "users.sqlite", "interactions.sqlite", "results.json", "run.lock"} <= files
    assert {"users", "groups", "predictions", "blobs", "tombstones"} <= folders
    found = [hit for path in sorted(SOURCE.rglob("*.py")) if path != LAYOUT for hit in spelled(path, files, folders)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "hit"),
    [
        ('folder / "users"', "/ 'users'"),
        ('folder / "config.yaml"', "config.yaml"),
        ('f"{folder}: results.json is missing"', "results.json"),
        ('("population", "groups", "users")', "a collection of all stages"),
        ('"report.html.j2"', None),
        ('{"metric": "users"}', None),
        ('"""Read results.json."""', None),
    ],
)
def test_the_search_finds_what_it_looks_for(tmp_path: Path, source: str, hit: str | None) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    found = list(spelled(path, *layout_names()))
    assert not found if hit is None else (len(found) == 1 and hit in found[0])


def test_stages_and_tiers_are_their_names_on_disk() -> None:
    assert [f"{stage}" for stage in Stage] == ["population", "groups", "users"]
    assert ("base", *Stage) == run_folder.STAGE_METHODS and Tier.NONE == "none"


def test_every_path_is_in_the_registry() -> None:
    run = RunFolder(Path("run"))
    files = [run.config, run.data, run.results, run.user_scores, run.report, run.lock, run.writers_lock, run.keys]
    files += [run.preflight, run.routing, run.analysis, run.methods_table, run.metrics_log, run.predictions_of("users")]
    files += [run.users.manifest, run.users.log, run.users.lock, run.users.fits_lock, run.users.router, run.users.work]
    files += [run.demo_rows, run.demo_truth, run.experts, run.poly, run.keys_lock, run.keys_required]
    files += [run.marker(Stage.GROUPS), run.checkpoint(Stage.GROUPS), run.variant_data("x"), run.user_report("u1")]
    files += [run.comparison("other", "csv"), run.seed(1).results, run.variant("x").marker(Stage.USERS)]
    assert not [path for path in files if kind_of(path.relative_to("run")) is None]
    assert kind_of(Path("notes.txt")) is None
    assert {kind_of(Path(pattern.replace("*", "x"))) for pattern in Personal} == {"personal"}


def test_a_folder_without_a_config_is_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"not a run folder \(config.yaml is missing\); run: proper run CONFIG"):
        require_run(tmp_path)
    RunFolder(tmp_path).config.touch()
    assert require_run(tmp_path).path == tmp_path
    with pytest.raises(RunFolderError, match="stage 'groups' is not trained yet; run: proper run CONFIG --out"):
        require_run(tmp_path).require_trained(Stage.GROUPS)


def test_only_listed_files_can_be_written_once_a_stage_is_trained(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.config.touch()
    run_folder.require_listed(tmp_path / "notes.txt")
    run.marker(Stage.POPULATION).parent.mkdir()
    run.marker(Stage.POPULATION).touch()
    with pytest.raises(InputError, match="choose another path"):
        run_folder.require_listed(tmp_path / "notes.txt")
    run_folder.require_listed(run.results)


def test_a_run_in_a_folder_called_seeds_or_variants_is_its_own_home(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()  # another program's
    for name in ("seeds", "variants"):
        run = RunFolder(tmp_path / name / "a")
        assert run.home == run
        run.marker(Stage.POPULATION).parent.mkdir(parents=True)
        run.marker(Stage.POPULATION).touch()
        run.config.touch()
        assert run.home == run.seed(1).home == run.variant("x").seed(2).home == run


def test_nested_runs_are_all_folders_with_a_config(tmp_path: Path) -> None:
    home = RunFolder(tmp_path / "run")
    inside = ("", "seeds/1", "seeds/2", "variants/poly-1f", "variants/poly-1f/seeds/3", "variants/poly-1f/aa")
    for name in inside:
        (home.path / name).mkdir(parents=True)
        (home.path / name / home.config.name).touch()
    home.users.blobs.mkdir(parents=True)
    (home.users.blobs / "1.shard").touch()
    (home.path / "seeds" / "link").symlink_to(home.path / "seeds" / "1")
    found = list(nested_runs(home.path))
    assert found[0] == home.path
    assert found[1:] == [each.parent for each in sorted(home.path.rglob(home.config.name)) if each != home.config]
    assert len(found) == len(inside)
