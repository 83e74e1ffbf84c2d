"""One exception tree with exit codes, and one hint for unknown names."""

from __future__ import annotations

import ast
from pathlib import Path

import proper
from proper import errors
from proper.errors import ProperError, did_you_mean

SOURCE = Path(proper.__file__).parent


def test_every_public_exception_of_the_package_is_in_the_tree() -> None:
    classes = [node for path in SOURCE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    bases = {
        node.name: {ast.unparse(base) for base in node.bases} for node in classes if isinstance(node, ast.ClassDef)
    }
    builtin = {"Exception", "BaseException", "ValueError", "RuntimeError", "KeyError", "OSError", "TypeError"}
    outside = {name for name, above in bases.items() if above & builtin and not name.startswith("_")}
    assert outside == {"ProperError"}
    assert {"BadValue", "BlobError", "APIError", "ConflictError"} <= bases.keys(), "the search reads classes"


def test_the_docstring_draws_the_tree_with_its_exit_codes() -> None:
    assert errors.__doc__ is not None
    drawn = {line.split()[0]: line for line in errors.__doc__.splitlines() if line.startswith("    ")}
    kinds = {
        name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, ProperError)
    }
    assert drawn.keys() == kinds.keys()
    for name, line in drawn.items():
        depth = (len(line) - len(line.lstrip())) // 2 - 2
        assert len(kinds[name].__mro__) - len(ProperError.__mro__) == depth, name
        assert int(line.split()[1]) == kinds[name].exit_code, name


def test_an_unknown_name_gets_the_nearest_or_all() -> None:
    assert did_you_mean("lable", ["label", "title"]) == "did you mean 'label'?"
    assert did_you_mean("LABEL", ["title", "Label"]) == "did you mean 'Label'?"
    assert did_you_mean("user", ["output", "user_id"]) == "did you mean 'user_id'?"
    assert did_you_mean("xyz", ["label", "title"]) == "known: label, title"
    for name, others in (("text", "site"), ("input", "output"), ("time", "title"), ("2.5", "2")):
        assert did_you_mean(name, [others]) == f"known: {others}"
    assert did_you_mean("zzz", [f"name{at}" for at in range(30)]).endswith("name19, ...")
    assert did_you_mean("xyz", []) == "none is known"
