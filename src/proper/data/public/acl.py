"""ACL Anthology: papers of its BibTeX export with abstracts become one row per author and paper.

English papers with an abstract of at least 200 characters (cut at 3,000) and a title of at least 10 count, each title
once; authors with at least 20 of them are users. Names are compared as they are spelled and are not kept. Co-authors
share papers, so a split must be by item or by time over all users.
"""

from __future__ import annotations

import gzip
import io
import logging
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from proper.data.public.bibtex import BibEntry, plain_text, read_bibtex, split_names
from proper.data.public.cleaning import clean_text, numbered_users, text_schema, write_parquet
from proper.errors import DataError

logger = logging.getLogger(__name__)

_MIN_TITLE, _MIN_ABSTRACT, _MAX_ABSTRACT = 10, 200, 3000
_MIN_PAPERS = 20
_COLUMNS = ("user_id", "item_id", "timestamp", "venue", "author_position", "n_authors", "abstract", "title", "license")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
# Ids before 2020 name the venue by a letter: P16-1001.
_OLD_ID = re.compile(r"([A-Z])(\d\d)-(\d{4})")
_OLD_VENUES = {
    "A": "anlp", "C": "coling", "D": "emnlp", "E": "eacl", "F": "jeptalnrecital", "H": "hlt", "I": "ijcnlp", "J": "cl",
    "K": "conll", "L": "lrec", "M": "muc", "N": "naacl", "O": "rocling", "P": "acl", "Q": "tacl", "R": "ranlp",
    "S": "semeval", "T": "tinlap", "U": "alta", "W": "ws", "X": "tipster", "Y": "paclic",
}  # fmt: skip


@dataclass(frozen=True)
class _Paper:
    item: str
    month: str
    venue: str
    authors: tuple[str, ...]
    abstract: str
    title: str


def convert_acl(file: Path, folder: Path, step: Callable[[], None]) -> dict[str, int]:
    """Write `acl_titles.parquet` into `folder`; return its number of rows.

    Args:
        file: `anthology+abstracts.bib.gz`, or the same file unpacked.
        folder: where the file is written.
        step: called once per entry.

    Raises:
        DataError: the file cannot be read, or no author has enough papers.
    """
    papers: dict[str, _Paper] = {}
    bad: list[str] = []
    with _opened(file) as lines:
        for number, entry in read_bibtex(lines):
            step()
            if isinstance(entry, str):
                bad.append(f"{file}:{number}: {entry}")
            elif (paper := _paper(entry)) is not None:
                papers.setdefault(paper.title.casefold(), paper)
    if bad:
        logger.warning("%d entries cannot be read and are left out; the first: %s", len(bad), bad[0])
    counts = Counter(author for paper in papers.values() for author in set(paper.authors))
    users = numbered_users({author: count for author, count in counts.items() if count >= _MIN_PAPERS})
    if not users:
        raise DataError(
            f"{file}: no author has {_MIN_PAPERS} English papers with abstracts; is it anthology+abstracts.bib.gz?"
        )
    rows = [row for paper in papers.values() for row in _rows(paper, users)]
    rows.sort(key=lambda row: (row["user_id"], row["timestamp"], row["item_id"]))
    schema = text_schema(*_COLUMNS, author_position=pa.int64(), n_authors=pa.int64())
    return {"acl_titles.parquet": write_parquet(folder / "acl_titles.parquet", rows, schema)}


def _paper(entry: BibEntry) -> _Paper | None:
    """Return the paper of an entry; None if it is not an English paper with title, abstract, author, year and id."""
    fields = entry.fields
    if not all(fields.get(name) for name in ("title", "abstract", "author", "year", "url")):
        return None
    if fields.get("language", "English").casefold() != "english":
        return None
    title, abstract = clean_text(plain_text(fields["title"])), clean_text(plain_text(fields["abstract"]))
    if len(title) < _MIN_TITLE or len(abstract) < _MIN_ABSTRACT:
        return None
    item, venue = item_and_venue(fields["url"].rstrip("/").rpartition("/")[2])
    # One author listed twice is one author.
    authors = tuple(dict.fromkeys(name.casefold() for name in split_names(fields["author"])))
    month = _month(fields["year"], fields.get("month", ""))
    return _Paper(item, month, venue, authors, abstract[:_MAX_ABSTRACT].rstrip(), title)


def _rows(paper: _Paper, users: dict[str, str]) -> Iterator[dict[str, Any]]:
    license_ = "CC-BY-4.0" if paper.month >= "2016" else "CC-BY-NC-SA-3.0"
    for position, author in enumerate(paper.authors, 1):
        if author in users:
            values = (users[author], paper.item, paper.month, paper.venue, position, len(paper.authors))
            yield dict(zip(_COLUMNS, (*values, paper.abstract, paper.title, license_), strict=True))


def item_and_venue(anthology_id: str) -> tuple[str, str]:
    """Return the item id and the venue of an id of the Anthology.

    "2023.emnlp-demo.41" is as it is, of "emnlp"; "W19-8655" is volume 86, paper 55: "W19-86-55", of "ws".
    """
    old = _OLD_ID.fullmatch(anthology_id)
    if old is None:
        volume = anthology_id.split(".")[1:2] or [""]
        return anthology_id, volume[0].partition("-")[0]
    letter, year, number = old.groups()
    workshops = letter == "W" or (letter + year == "C69") or (letter + year == "D19" and number >= "5000")
    cut = 2 if workshops else 1
    return f"{letter}{year}-{int(number[:cut])}-{int(number[cut:])}", _OLD_VENUES.get(letter, letter.lower())


def _month(year: str, month: str) -> str:
    """Return "2023-12"; the year alone if no month is named. Of "30~" # jul # "--" # aug, the first month counts."""
    found = re.search("|".join(_MONTHS), month.lower())
    return f"{year}-{_MONTHS.index(found[0]) + 1:02d}" if found else year


@contextmanager
def _opened(file: Path) -> Iterator[IO[str]]:
    """Open a text file for reading, decompressed if it is gzip; read errors become DataErrors."""
    try:
        with file.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            binary: Any = gzip.GzipFile(fileobj=raw) if packed else raw
            with io.TextIOWrapper(binary, "utf-8") as lines:
                yield lines
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
