"""Write the generated pages, or check that they are current."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from docs_reference import api, cli, config, http, modules

ROOT = Path(__file__).parents[2]

PAGES: dict[str, Callable[[], str]] = {
    "docs/reference/cli.md": cli.page,
    "docs/reference/config.md": config.page,
    "docs/reference/api.md": api.page,
    "docs/reference/http.md": http.page,
    "docs/architecture.md": modules.architecture,
    "docs/images/packages.svg": modules.diagram,
}


def stale(root: Path = ROOT) -> list[str]:
    """Return the names of pages that differ from what would be written."""
    return [name for name, make in PAGES.items() if not _same(root / name, make())]


def write(root: Path = ROOT) -> None:
    """Write every page."""
    for name, make in PAGES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(make(), encoding="utf-8")


def main() -> int:
    """Run the command line; exit code 1 if `--check` finds a stale page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is stale")
    if not parser.parse_args().check:
        write()
        return 0
    names = stale()
    for name in names:
        print(f"{name} is stale; run: make reference", file=sys.stderr)
    return 1 if names else 0


def _same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
