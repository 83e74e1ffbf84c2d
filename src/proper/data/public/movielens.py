"""MovieLens ml-latest-small: `ratings.csv`, `tags.csv` and `movies.csv` of the ZIP archive, joined into two tables.

Users keep the publisher's numbers (`u0001` is user 1), a time becomes its date (UTC), "Action|Crime" becomes "Action,
Crime", and rows are ordered by user, date and film. Ratings have 0.5 to 5 stars.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import pyarrow as pa

from proper.data.public.cleaning import text_schema, write_parquet
from proper.errors import DataError

_NO_GENRES = "(no genres listed)"
_COLUMNS = ("user_id", "item_id", "timestamp", "title", "genres")
_NEEDED = {
    "movies.csv": ("movieId", "title", "genres"),
    "ratings.csv": ("userId", "movieId", "rating", "timestamp"),
    "tags.csv": ("userId", "movieId", "tag", "timestamp"),
}


def convert_movielens(archive: Path, folder: Path, step: Callable[[], None]) -> dict[str, int]:
    """Write `ratings.parquet` and `tags.parquet` into `folder`; return their numbers of rows.

    Args:
        archive: the ZIP archive as published.
        folder: where the files are written.
        step: called once per rating or tag.

    Raises:
        DataError: the archive or a row in it cannot be read; the message names file and line.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            movies = {
                row["movieId"]: (row["title"], _genres(row["genres"]))
                for _, row in _rows(archive, opened, "movies.csv")
            }
            ratings = _joined(archive, opened, "ratings.csv", movies, step)
            tags = _joined(archive, opened, "tags.csv", movies, step)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{archive}: cannot be read as a ZIP archive: {error}") from error
    written = {}
    for name, rows, value, kind in (
        ("ratings.parquet", ratings, "rating", pa.float32()),
        ("tags.parquet", tags, "tag", pa.string()),
    ):
        written[name] = write_parquet(folder / name, rows, text_schema(*_COLUMNS, value, **{value: kind}))
    return written


def _genres(text: str) -> str:
    return "" if text == _NO_GENRES else ", ".join(text.split("|"))


def _joined(
    archive: Path, opened: zipfile.ZipFile, name: str, movies: dict[str, tuple[str, str]], step: Callable[[], None]
) -> list[dict[str, object]]:
    """Return the rows of `ratings.csv` or `tags.csv` with the films' titles and genres, ordered."""
    value = "rating" if name == "ratings.csv" else "tag"
    found: list[dict[str, object]] = []
    for line, row in _rows(archive, opened, name):
        step()
        try:
            when = datetime.fromtimestamp(int(row["timestamp"]), UTC).strftime("%Y-%m-%d")
            user = f"u{int(row['userId']):04d}"
            answer: object = float(row["rating"]) if value == "rating" else row["tag"]
        except (ValueError, OverflowError) as error:
            raise DataError(f"{archive}: {name}:{line}: {error}") from error
        if row["movieId"] not in movies:
            raise DataError(f"{archive}: {name}:{line}: movieId: '{row['movieId']}' is not in movies.csv")
        title, genres = movies[row["movieId"]]
        values = (user, row["movieId"], when, title, genres)
        found.append({**dict(zip(_COLUMNS, values, strict=True)), value: answer})
    # Tags of one film on one day keep the order of the file.
    found.sort(key=lambda each: (each["user_id"], each["timestamp"], each["item_id"]))
    return found


def _rows(archive: Path, opened: zipfile.ZipFile, name: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line, row) of one CSV file in the archive, wherever its folder is."""
    member = next((each for each in opened.namelist() if PurePosixPath(each).name == name), None)
    if member is None:
        raise DataError(f"{archive}: no {name} in this archive; is it ml-latest-small.zip?")
    with opened.open(member) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as text:
        reader = csv.DictReader(text)
        missing = [column for column in _NEEDED[name] if column not in (reader.fieldnames or ())]
        if missing:
            raise DataError(f"{archive}: {name}:1: no column '{missing[0]}'")
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"{archive}: {name}:{reader.line_num}: not {len(reader.fieldnames or ())} cells")
                yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{archive}: {name}:{reader.line_num}: not readable as CSV: {error}") from error
