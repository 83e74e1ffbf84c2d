"""News Category Dataset (HuffPost): JSON lines of articles become rows with their single author as user.

A byline loses "By", news agencies and contributors' blurbs; an article counts only if exactly one author remains.
Articles with the same link, or the same headline and date, count once. Authors' names are not kept. `label` merges
categories that were renamed or mean the same.
"""

from __future__ import annotations

import hashlib
import html
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from proper.data.public.cleaning import clean_text, numbered_users, text_schema, write_parquet
from proper.data.text_files import json_rows
from proper.errors import DataError

_COLUMNS = ("user_id", "item_id", "timestamp", "description", "headline", "category", "label", "source_version")
_FIELDS = ("link", "headline", "category", "short_description", "authors", "date")
_LABELS = {
    "ARTS": "CULTURE & ARTS",
    "ARTS & CULTURE": "CULTURE & ARTS",
    "BUSINESS": "BUSINESS & MONEY",
    "COLLEGE": "EDUCATION",
    "GREEN": "ENVIRONMENT",
    "HEALTHY LIVING": "WELLNESS",
    "MONEY": "BUSINESS & MONEY",
    "PARENTS": "PARENTING",
    "SCIENCE": "SCIENCE & TECH",
    "STYLE": "STYLE & BEAUTY",
    "TASTE": "FOOD & DRINK",
    "TECH": "SCIENCE & TECH",
    "THE WORLDPOST": "WORLD NEWS",
    "WORLDPOST": "WORLD NEWS",
}
_AGENCIES = {
    "afp", "agence france-presse", "ap", "associated press", "guest writer", "huffpost", "huffington post",
    "on assignment for huffpost", "reuters", "the associated press", "the huffington post", "the conversation",
}  # fmt: skip
_TITLES = {"esq", "iii", "jd", "jr", "ma", "mba", "md", "mph", "ms", "msw", "phd", "rd", "rn", "sr"}
_BLURB = re.compile(r",\s*(?:Contributor|Guest Writer|Columnist)s?.*$|[\r\n].*$", re.IGNORECASE | re.DOTALL)
_BETWEEN = re.compile(r"\s*,\s*|\s+(?:and|&|with)\s+", re.IGNORECASE)


def convert_news(file: Path, folder: Path, step: Callable[[], None]) -> dict[str, int]:
    """Write `huffpost_news.parquet` into `folder`; return its number of rows.

    Args:
        file: `News_Category_Dataset_v3.json` (or v2), also compressed or in Kaggle's ZIP archive.
        folder: where the file is written.
        step: called once per article.

    Raises:
        DataError: the file, or a line of it, cannot be read; the message names file and line.
    """
    articles: list[tuple[str, dict[str, Any]]] = []
    links, headlines = set[str](), set[tuple[str, str]]()
    with _unzipped(file) as lines:
        version = "v2" if "v2" in lines.name else "v3"
        for number, row in json_rows(lines):
            step()
            article = _checked(lines, number, row)
            author, key = sole_author(article["authors"]), (article["headline"], article["date"])
            if author is None or article["link"] in links or key in headlines or not article["headline"].strip():
                continue
            links.add(article["link"])
            headlines.add(key)
            articles.append((author, _converted(article, version)))
    if not articles:
        raise DataError(f"{file}: no article with one author; is it News_Category_Dataset_v3.json?")
    users = numbered_users(Counter(author for author, _ in articles))
    rows = [{"user_id": users[author], **row} for author, row in articles]
    rows.sort(key=lambda row: (row["user_id"], row["timestamp"], row["item_id"]))
    return {"huffpost_news.parquet": write_parquet(folder / "huffpost_news.parquet", rows, text_schema(*_COLUMNS))}


def sole_author(byline: str) -> str | None:
    """Return the name of a byline's only author, case-folded; None for no author or several."""
    names = []
    for part in _BETWEEN.split(_BLURB.sub("", html.unescape(byline).strip())):
        name = " ".join(part.split()).casefold().removeprefix("by ").strip()
        if name and name not in _AGENCIES and name.replace(".", "") not in _TITLES:
            names.append(name)
    return names[0] if len(names) == 1 else None


def _checked(file: Path, number: int, row: dict[str, Any] | str) -> dict[str, str]:
    if isinstance(row, str):
        raise DataError(f"{file.name}:{number}: row: {row}")
    for field in _FIELDS:
        if not isinstance(row.get(field), str):
            raise DataError(f"{file.name}:{number}: {field}: missing, or not text; is it the News Category Dataset?")
    return row


def _converted(article: dict[str, str], version: str) -> dict[str, str]:
    category = article["category"].strip()
    slug = article["link"].rstrip("/").rpartition("/")[2]
    return {
        "item_id": hashlib.sha1(slug.encode(), usedforsecurity=False).hexdigest()[:12],
        "timestamp": article["date"][:10],
        "description": clean_text(article["short_description"]),
        "headline": clean_text(article["headline"]),
        "category": category,
        "label": _LABELS.get(category, category),
        "source_version": version,
    }


@contextmanager
def _unzipped(file: Path) -> Iterator[Path]:
    """Yield the file, or the JSON file of a ZIP archive unpacked into a temporary folder."""
    if file.suffix.lower() != ".zip":
        yield file
        return
    try:
        with zipfile.ZipFile(file) as archive, TemporaryDirectory() as folder:
            names = [name for name in archive.namelist() if name.lower().endswith(".json")]
            if len(names) != 1:
                raise DataError(f"{file}: {len(names)} .json files in this archive; one is expected")
            yield Path(archive.extract(names[0], folder))
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{file}: cannot be read as a ZIP archive: {error}") from error
