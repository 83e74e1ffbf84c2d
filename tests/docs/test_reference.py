"""The generated pages of docs/ are what the code says today, and they leave nothing out."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from proper.config import Config

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from docs_reference import api, cli, config, http, markdown, modules  # noqa: E402
from docs_reference.__main__ import PAGES, stale, write  # noqa: E402


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_current(name: str) -> None:
    current = (ROOT / name).read_text(encoding="utf-8")
    assert current == PAGES[name](), f"{name} is stale; run: make reference"


def test_a_page_that_differs_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"docs/a.md": lambda: "a\n", "docs/b.md": lambda: "b\n"}
    monkeypatch.setattr("docs_reference.__main__.PAGES", made)
    assert stale(tmp_path) == ["docs/a.md", "docs/b.md"]
    write(tmp_path)
    assert stale(tmp_path) == []
    (tmp_path / "docs/b.md").write_text("old\n")
    assert stale(tmp_path) == ["docs/b.md"]


def test_every_command_and_option_is_on_the_page() -> None:
    page = cli.page()
    found = dict(cli.commands())
    assert len(found) > 20
    for name, command in found.items():
        section = page.partition(f"## proper {name} {{")[2].partition("\n## ")[0]
        for parameter in command.params:
            if parameter.param_type_name == "option" and not parameter.hidden:
                assert all(f"`{spelling}`" in section for spelling in parameter.opts), f"{name} {parameter.opts}"
                assert parameter.help, f"{name} {parameter.opts} has no help text"


def test_config_keys_in_texts_exist() -> None:
    keys = set(dict(config.keys()))
    sections = {key[:at] for key in keys for at in range(len(key)) if key[at] == "."}
    top = "|".join(sorted({key.partition(".")[0] for key in keys if "." in key}))
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for key in re.findall(rf"`((?:{top})(?:\.[a-z_]+)+)[`:=]", path.read_text(encoding="utf-8")):
            is_file = key.endswith((".json", ".jsonl", ".sqlite", ".safetensors"))
            assert is_file or key in keys | sections, f"{path.name}: no config key {key}"


def test_every_config_key_is_on_the_page() -> None:
    def count(model: type[BaseModel]) -> int:
        inner = [field.annotation for field in model.model_fields.values()]
        nested = [one for one in inner if isinstance(one, type) and issubclass(one, BaseModel)]
        return len(inner) - len(nested) + sum(map(count, nested))

    keys = dict(config.keys())
    assert len(keys) == count(Config) > 60
    for key, meaning in keys.items():
        assert meaning.endswith("."), f"{key}: describe it in the docstring of its section"
        section, _, name = key.rpartition(".")
        title = f"## `{section}`" if section else "## Top level"
        assert f"| `{name}` |" in config.page().partition(f"{title}\n")[2].partition("\n## ")[0], key


def test_every_route_and_schema_is_on_the_page() -> None:
    page, document = http.page(), http.openapi()
    routes = list(http.operations(document))
    assert {path for path, _, _ in routes} == set(document["paths"])
    for path, method, _ in routes:
        assert f"## {method} {path}\n" in page
    for name in document["components"]["schemas"]:
        assert f"### {name}\n" in page or "ValidationError" in name


def test_every_module_has_a_line() -> None:
    found = dict(modules.modules())
    files = [path for path in (ROOT / "src" / "proper").rglob("*.py") if path.read_text(encoding="utf-8").strip()]
    assert len(found) == len(files)
    for name, line in found.items():
        assert line.endswith((".", "`.")), f"{name}: {line}"


def test_the_diagram_has_every_package_of_the_contract() -> None:
    names = [name for line in modules.layers() for name in line]
    assert all(f">{name}</text>" in modules.diagram() for name in names)


def test_public_names_are_found_once() -> None:
    with pytest.raises(LookupError, match="0 times"):
        api.find("NoSuchName")
    assert api.find("Config") is Config


def test_docstrings_become_lists() -> None:
    text = (
        "Add.\n\nSee `x_y` and a_b.\n\nArgs:\n    one: the first\n        of two.\n    two: the last.\n\n"
        "Raises:\n    ValueError: never."
    )
    assert markdown.docstring(text) == (
        "Add.\n\nSee `x_y` and a\\_b.\n\n**Args**\n\n- `one`: the first of two.\n- `two`: the last.\n\n"
        "**Raises**\n\n- `ValueError`: never.\n"
    )
    rest, found = markdown.attributes("One.\n\nAttributes:\n    a, b: two numbers.\n\nMore.")
    assert rest == "One.\n\nMore." and found == {"a": "two numbers.", "b": "two numbers."}


def test_cells_cannot_break_a_table() -> None:
    assert markdown.table(("a", "b"), [("x|y", "two\nlines")]) == "| a | b |\n|---|---|\n| x\\|y | two lines |\n"
