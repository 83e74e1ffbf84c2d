"""Extraction of one user's data from each kind of personal file, as JSON values, for `personal_files`.

A page (HTML) or table (CSV) that shows several users gives the elements or rows that name this one; the same data is in
the other files too.
"""

from __future__ import annotations

import csv
import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from proper.data.chat import readable
from proper.errors import StoreError
from proper.files import read_json
from proper.sqlite_files import open_to_read

_BLOCKS = {"article", "caption", "dd", "dt", "figcaption", "h1", "h2", "h3", "h4", "li", "p", "summary", "title"}
_BLOCKS |= {"tr", "td", "th"}
_NAMES = ("user", "user_id")


def _names(user: str) -> re.Pattern[str]:
    """Return a pattern that finds the id, but not inside a longer word: "ann" is not in "joanna"."""
    return re.compile(rf"(?<!\w){re.escape(user)}(?!\w)")


def from_lines(path: Path, user: str) -> list[Any]:
    """Return a user's lines of a JSONL file; a line that is not JSON is skipped."""
    found = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and user in (row.get(name) for name in _NAMES):
                found.append(row)
    return found


def from_json(path: Path, user: str) -> list[Any]:
    """Return the parts of a JSON file that are about a user: `at`, the keys that lead there, and `value`."""
    return [{"at": at, "value": value} for at, value in _about(read_json(path), user, [], lambda key: key == user)]


def from_truth(path: Path, user: str) -> list[Any]:
    """Return the parts of the demo's ground truth about a user and the user's items, which are named USER-NUMBER."""

    def is_of_user(key: str) -> bool:
        return key == user or key.startswith(f"{user}-")

    return [{"at": at, "value": value} for at, value in _about(read_json(path), user, [], is_of_user)]


def _about(value: Any, user: str, at: list[Any], is_of_user: Callable[[str], bool]) -> Iterator[tuple[list[Any], Any]]:
    if isinstance(value, dict):
        if user in (value.get(name) for name in _NAMES):
            yield at, value
            return
        for key, each in value.items():
            if is_of_user(key):
                yield [*at, key], each
            else:
                yield from _about(each, user, [*at, key], is_of_user)
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _about(each, user, [*at, index], is_of_user)
    elif value == user:
        yield at, value


def from_data(path: Path, user: str) -> list[Any]:
    """Return a user's rows of prepared data, with their texts; none if the file is half-written."""
    query = """SELECT r.id AS row, r.part, r.reason, r.time, r.tokens, t.prompt, t.target, t.item
        FROM rows r JOIN texts t ON t.id = r.text JOIN users u ON u.number = r.user WHERE u.id = ? ORDER BY r.id"""
    try:
        with closing(open_to_read(path)) as data:
            data.row_factory = sqlite3.Row
            return [{**dict(row), "prompt": readable(row["prompt"])} for row in data.execute(query, (user,))]
    except sqlite3.Error as error:
        if path.suffix != ".sqlite":
            return []
        raise StoreError(f"{path}: cannot be read: {error}") from error


def from_answers(path: Path, user: str) -> list[Any]:
    """Return the answers to a user's queries of a file in LaMP's format, which names no users."""
    ids = set[str]()
    for beside in sorted(path.parent.glob("*.jsonl")):
        for row in from_lines(beside, user):
            ids |= {str(row.get("item")), f"{user}/{row.get('item')}"}  # see `evaluation.lamp_predictions`
    content = read_json(path)
    golds = content.get("golds", []) if isinstance(content, dict) else []
    return [row for row in golds if isinstance(row, dict) and str(row.get("id")) in ids]


def from_table(path: Path, user: str) -> list[Any]:
    """Return the rows of a CSV file in which a cell is the user's id or names it."""
    with path.open(encoding="utf-8", errors="replace", newline="") as lines:
        return [row for row in csv.reader(lines) if any(_names(user).search(cell) for cell in row)]


def from_page(path: Path, user: str) -> list[Any]:
    """Return the texts of the elements of a page that name a user, and the attributes that do."""
    reader = _Page(user)
    reader.feed(path.read_text(encoding="utf-8", errors="replace"))
    reader.close()
    return [*dict.fromkeys(reader.finish())]


class _Page(HTMLParser):
    """Collects the text of every block element, and keeps those that name a user."""

    def __init__(self, user: str) -> None:
        super().__init__(convert_charrefs=True)
        self.names, self.found = _names(user), list[str]()
        self.open: list[tuple[str, list[str]]] = [("", [])]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for _, value in attrs if value is not None and self.names.search(value)]
        if tag in _BLOCKS:
            self.open.append((tag, []))

    def handle_endtag(self, tag: str) -> None:
        if tag in _BLOCKS and any(name == tag for name, _ in self.open):
            while self._close_tag() != tag:
                pass

    def handle_data(self, data: str) -> None:
        self.open[-1][1].append(data)

    def finish(self) -> list[str]:
        """Shut what is still open, and return all texts that name the user."""
        while len(self.open) > 1:
            self._close_tag()
        self._keep(self.open[0][1])
        return self.found

    def _close_tag(self) -> str:
        tag, texts = self.open.pop()
        self._keep(texts)
        if tag in ("td", "th"):  # a row is returned whole
            self.open[-1][1].append(f" {''.join(texts)} ")
        return tag

    def _keep(self, texts: list[str]) -> None:
        text = " ".join("".join(texts).split())
        if self.names.search(text):
            self.found.append(text)
