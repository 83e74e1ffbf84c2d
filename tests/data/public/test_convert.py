"""Small files in the original formats become the columns that configs/ name."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from proper.config import load_config
from proper.data.interactions import BadRows, read_interactions
from proper.data.public.acl import convert_acl, item_and_venue
from proper.data.public.catalog import DATASETS, convert_dataset
from proper.data.public.cleaning import clean_text, mask_addresses, numbered_users
from proper.data.public.git_history import clean_body, prefix_of
from proper.data.public.movielens import convert_movielens
from proper.data.public.news import convert_news, sole_author
from proper.data.sources import FROM_GIT
from proper.errors import DataError, InputError

ROOT = Path(__file__).parents[3]
CONFIGS = [path for path in sorted(ROOT.glob("configs/**/*.yaml")) if path.parent.name not in ("lamp", "simulation")]


def nothing() -> None:
    """A step that nobody counts."""


def rows(path: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(path).to_pylist())


def sheet(head: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([list(head), *map(list, lines)])
    return text.getvalue()


def movielens(path: Path, **files: str) -> Path:
    made = {
        "movies": sheet(
            ("movieId", "title", "genres"),
            [(1, "Toy Story (1995)", "Adventure|Comedy"), (20, "A, B", "(no genres listed)")],
        ),
        "ratings": sheet(
            ("userId", "movieId", "rating", "timestamp"),
            [(2, 1, 3.5, 964982703), (1, 20, 0.5, 964982703), (1, 1, 5.0, 964982999), (1, 1, 4.0, 0)],
        ),
        "tags": sheet(
            ("userId", "movieId", "tag", "timestamp"), [(2, 1, "fun", 964982703), (2, 1, "Pixar", 964982700)]
        ),
        **files,
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in made.items():
            archive.writestr(f"ml-latest-small/{name}.csv", text)
        archive.writestr("ml-latest-small/README.txt", "usage license")
    return path


def article(n: int, authors: str = "Ann Lee", **fields: str) -> dict[str, str]:
    return {
        "link": f"https://www.huffpost.com/entry/a-slug_n_{n:024x}",
        "headline": f"Headline {n} &amp; more",
        "category": "THE WORLDPOST",
        "short_description": f"Mail ann@example.org or call 555-123-4567 on {n}, see https://example.org/x",
        "authors": authors,
        "date": f"2022-09-{n % 28 + 1:02d}",
        **fields,
    }


def news(path: Path, articles: Iterable[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in articles))
    return path


def paper(n: int, authors: str, **fields: str) -> str:
    values = {
        "title": f"{{A}} Title Number {n} of {{LM}}s",
        "author": authors,
        "month": "jul",
        "year": "2019",
        "url": f"https://aclanthology.org/P19-{1000 + n}",
        "abstract": f"Abstract {n} with {{\\'e}} and a@b.org. " + "More words follow here. " * 10,
        **fields,
    }
    lines = [
        f"    {name} = {value if name == 'month' else chr(34) + value + chr(34)},\n" for name, value in values.items()
    ]
    return f"@inproceedings{{k-{n},\n{''.join(lines)}}}\n"


class TestMovieLens:
    def test_ratings_and_tags_are_joined_with_films(self, tmp_path: Path) -> None:
        made = convert_movielens(movielens(tmp_path / "x.zip"), tmp_path / "out", nothing)
        assert made == {"ratings.parquet": 4, "tags.parquet": 2}
        found = rows(tmp_path / "out" / "ratings.parquet")
        assert [(row["user_id"], row["timestamp"], row["item_id"], row["rating"]) for row in found] == [
            ("u0001", "1970-01-01", "1", 4.0),
            ("u0001", "2000-07-30", "1", 5.0),
            ("u0001", "2000-07-30", "20", 0.5),
            ("u0002", "2000-07-30", "1", 3.5),
        ]
        assert (found[0]["title"], found[0]["genres"]) == ("Toy Story (1995)", "Adventure, Comedy")
        assert (found[2]["title"], found[2]["genres"]) == ("A, B", "")
        assert [row["tag"] for row in rows(tmp_path / "out" / "tags.parquet")] == ["fun", "Pixar"]

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({"ratings": "userId,movieId,rating\n1,1,2\n"}, "ratings.csv:1: no column 'timestamp'"),
            ({"ratings": "userId,movieId,rating,timestamp\n1,7,2,3\n"}, "ratings.csv:2: movieId: '7' is not in movies"),
            ({"tags": "userId,movieId,tag,timestamp\n1,1,x\n"}, "tags.csv:2: not 4 cells"),
            ({"tags": "userId,movieId,tag,timestamp\nx,1,x,0\n"}, "tags.csv:2: invalid literal for int"),
        ],
    )
    def test_a_bad_line_is_named_and_nothing_is_written(
        self, tmp_path: Path, files: dict[str, str], message: str
    ) -> None:
        with pytest.raises(DataError, match=message):
            convert_movielens(movielens(tmp_path / "x.zip", **files), tmp_path / "out", nothing)
        assert not (tmp_path / "out").exists()

    def test_other_files_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_text("no archive")
        with pytest.raises(DataError, match="cannot be read as a ZIP archive"):
            convert_movielens(tmp_path / "x", tmp_path, nothing)
        with zipfile.ZipFile(tmp_path / "y", "w") as archive:
            archive.writestr("else.csv", "")
        with pytest.raises(DataError, match="no movies.csv in this archive; is it ml-latest-small.zip"):
            convert_movielens(tmp_path / "y", tmp_path, nothing)


class TestNews:
    def test_articles_with_one_author_become_rows(self, tmp_path: Path) -> None:
        made = [
            article(1, "Ben"),
            article(2),
            article(3, "ANN LEE, AP"),
            article(4, "Ann Lee and Ben"),
            article(5, ""),
            article(2, "Ben"),  # the same link
            article(6, headline="Headline 2 &amp; more", date="2022-09-03"),  # the same headline and date
            article(7, category="POLITICS", date="2022-09-30"),
        ]
        written = convert_news(news(tmp_path / "News_Category_Dataset_v3.json", made), tmp_path, nothing)
        assert written == {"huffpost_news.parquet": 4}
        found = rows(tmp_path / "huffpost_news.parquet")
        assert [row["user_id"] for row in found] == ["u0000", "u0000", "u0000", "u0001"]
        first = found[0]
        assert first["item_id"] == hashlib.sha1(f"a-slug_n_{2:024x}".encode()).hexdigest()[:12]
        assert (first["timestamp"], first["headline"]) == ("2022-09-03", "Headline 2 & more")
        assert first["description"] == "Mail [email] or call [phone] on 2, see [url]"
        assert (first["category"], first["label"]) == ("THE WORLDPOST", "WORLD NEWS")
        assert found[2]["label"] == "POLITICS" and first["source_version"] == "v3"

    def test_kaggle_s_archive_and_compressed_files_are_read_too(self, tmp_path: Path) -> None:
        plain = news(tmp_path / "News_Category_Dataset_v2.json", [article(1)])
        with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
            archive.write(plain, plain.name)
        (tmp_path / "x.json.gz").write_bytes(gzip.compress(plain.read_bytes()))
        for name, version in ((plain.name, "v2"), ("archive.zip", "v2"), ("x.json.gz", "v3")):
            convert_news(tmp_path / name, tmp_path / name[:3], nothing)
            (row,) = rows(tmp_path / name[:3] / "huffpost_news.parquet")
            assert row["source_version"] == version

    @pytest.mark.parametrize(
        ("byline", "author"),
        [
            ("Carla K. Johnson, AP", "carla k. johnson"),
            ("By DAVID KLEPPER, Associated Press", "david klepper"),
            ("Grace Maalouf, Ph.D.", "grace maalouf"),
            ("Ron Dicker and Nick Wing", None),
            ("Jo Li & Al Bo", None),
            ("Reuters, Reuters", None),
            ("Ann Lee, ContributorFounder of Things, and More", "ann lee"),
            ("Ann Lee, Contributor\nAuthor", "ann lee"),
            ("Ann Lee\nAuthor, speaker", "ann lee"),
            ("", None),
        ],
    )
    def test_who_wrote_an_article(self, byline: str, author: str | None) -> None:
        assert sole_author(byline) == author

    def test_a_bad_line_is_named(self, tmp_path: Path) -> None:
        path = news(tmp_path / "x.json", [article(1), {"headline": "only"}])
        with pytest.raises(DataError, match="x.json:2: link: missing, or not text"):
            convert_news(path, tmp_path, nothing)
        path.write_text("{}{}\n")
        with pytest.raises(DataError, match="x.json:1: row: not JSON"):
            convert_news(path, tmp_path, nothing)
        with pytest.raises(DataError, match="no article with one author"):
            convert_news(news(path, [article(1, "")]), tmp_path, nothing)


class TestACL:
    def test_papers_become_a_row_per_author(self, tmp_path: Path) -> None:
        entries = [paper(n, "Lee, Ann  and\n      {\\'E}mile, Bob" if n < 20 else "Lee, Ann") for n in range(21)]
        entries += [
            paper(30, "Lee, Ann", abstract="too short"),
            paper(31, "Lee, Ann", language="French"),
            paper(5, "Lee, Ann", url="https://aclanthology.org/2020.x-1.1"),  # the same title
            paper(32, "Rare, Author and Lee, Ann", url="https://aclanthology.org/2015.findings-acl.7/", year="2015"),
            "@misc{broken, title = {never closed\n",
            '@proceedings{p,\n    title = "No abstract",\n}\n',
        ]
        path = tmp_path / "anthology+abstracts.bib.gz"
        path.write_bytes(gzip.compress("".join(entries).encode()))
        steps: list[None] = []
        assert convert_acl(path, tmp_path, lambda: steps.append(None)) == {"acl_titles.parquet": 42}
        assert len(steps) == 27
        found = rows(tmp_path / "acl_titles.parquet")
        assert {row["user_id"] for row in found} == {"u0000", "u0001"}
        first, second = found[0], found[1]
        assert (first["timestamp"], first["license"], first["item_id"]) == (
            "2015-07",
            "CC-BY-NC-SA-3.0",
            "2015.findings-acl.7",
        )
        assert (first["author_position"], first["n_authors"], first["venue"]) == (2, 2, "findings")
        assert (second["title"], second["item_id"]) == ("A Title Number 0 of LMs", "P19-1-0")
        assert second["abstract"].startswith("Abstract 0 with é and [email]. More words")
        assert second["license"] == "CC-BY-4.0" and second["venue"] == "acl"

    @pytest.mark.parametrize(
        ("name", "item", "venue"),
        [
            ("2023.emnlp-demo.41", "2023.emnlp-demo.41", "emnlp"),
            ("L16-1098", "L16-1-98", "lrec"),
            ("W19-8655", "W19-86-55", "ws"),
            ("D19-5001", "D19-50-1", "emnlp"),
            ("D19-1001", "D19-1-1", "emnlp"),
        ],
    )
    def test_ids_of_the_anthology(self, name: str, item: str, venue: str) -> None:
        assert item_and_venue(name) == (item, venue)

    def test_other_files_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "x.bib"
        path.write_text(paper(1, "Lee, Ann"))
        with pytest.raises(DataError, match="no author has 20 English papers"):
            convert_acl(path, tmp_path, nothing)
        path.write_bytes(gzip.compress(b"x" * 1000)[:-9])
        with pytest.raises(DataError, match="cannot be read"):
            convert_acl(path, tmp_path, nothing)


def test_conversion_is_deterministic_and_leaves_license_and_checksums(tmp_path: Path) -> None:
    made = movielens(tmp_path / "ml.zip")
    for folder in ("a", "b"):
        convert_dataset(DATASETS["movielens-small"], made, tmp_path / folder)
    for name in ("ratings.parquet", "tags.parquet", "SHA256SUMS", "LICENSE.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    digest = hashlib.sha256((tmp_path / "a" / "tags.parquet").read_bytes()).hexdigest()
    assert f"{digest}  tags.parquet\n" in (tmp_path / "a" / "SHA256SUMS").read_text()
    (tmp_path / "a" / "tags.parquet").write_text("mine")
    with pytest.raises(InputError, match="tags.parquet: has changed"):
        convert_dataset(DATASETS["movielens-small"], made, tmp_path / "a")


def test_users_are_numbered_from_the_one_with_most_rows() -> None:
    assert numbered_users({"b": 2, "a": 2, "c": 3}) == {"c": "u0000", "a": "u0001", "b": "u0002"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_names_a_file_that_a_stranger_can_get(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)  # where no data is
    data = Path(load_config(path).data.path)
    if data.parts[0] == "runs":
        return  # made of the others by recipes/findings.sh
    folder, name, file = data.parts
    assert folder == "data" and (name == FROM_GIT or file in DATASETS[name].files)


def test_a_config_whose_data_is_missing_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, how in (
        ("movielens-rating", "get it with: proper data fetch movielens-small"),
        ("lamp/lamp-3", "get it with: proper data fetch lamp-3 --split time"),
        ("git-area", "make it with: proper data from-git REPO --out data/git-commits/git_commits.parquet"),
    ):
        config = load_config(ROOT / "configs" / f"{name}.yaml")
        with pytest.raises(DataError, match=f"; {how}$"):
            list(read_interactions(config.data, BadRows(), config.task))


def test_what_is_converted_is_read_by_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    papers = "".join(paper(n, "Lee, Ann") for n in range(20))
    (tmp_path / "x.bib").write_text(papers)
    convert_dataset(DATASETS["acl-titles"], tmp_path / "x.bib", Path("data/acl-titles"))
    convert_dataset(DATASETS["huffpost-news"], news(tmp_path / "x.json", [article(1)]), Path("data/huffpost-news"))
    convert_dataset(DATASETS["movielens-small"], movielens(tmp_path / "x.zip"), Path("data/movielens-small"))
    for name, count in (("acl-title", 20), ("huffpost-label", 1), ("movielens-rating", 4)):
        config, bad = load_config(ROOT / "configs" / f"{name}.yaml"), BadRows()
        found = list(read_interactions(config.data, bad, config.task))
        assert (len(found), bad.count) == (count, 0)
        assert all(row.time is not None and row.item for row in found)


@pytest.fixture
def real() -> Callable[[str], list[dict[str, Any]]]:
    """Read a real data set below `data/`, where it is."""

    def read(name: str) -> list[dict[str, Any]]:
        path = ROOT / "data" / name
        if not path.is_file():
            pytest.skip(f"{path} is not there; `proper data fetch` gets public data sets")
        return rows(path)

    return read


def test_real_ratings_survive_the_way_back_to_the_original_format(
    real: Callable[[str], list[dict[str, Any]]], tmp_path: Path
) -> None:
    wanted, tags = (
        [row for row in real(f"movielens-small/{name}.parquet") if row["user_id"] < "u0200"]
        for name in ("ratings", "tags")
    )
    films = {
        row["item_id"]: (row["title"], row["genres"].replace(", ", "|") or "(no genres listed)")
        for row in wanted + tags
    }

    def lines(found: list[dict[str, Any]], value: str) -> list[tuple[object, ...]]:
        seconds = {
            day: int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp())
            for day in {r["timestamp"] for r in found}
        }
        return [
            (int(row["user_id"][1:]), row["item_id"], row[value], seconds[row["timestamp"]] + 86399) for row in found
        ]

    made = movielens(
        tmp_path / "x.zip",
        movies=sheet(("movieId", "title", "genres"), [(item, *film) for item, film in films.items()]),
        ratings=sheet(
            ("userId", "movieId", "rating", "timestamp"), sorted(lines(wanted, "rating"), key=lambda row: row[:2])
        ),
        tags=sheet(("userId", "movieId", "tag", "timestamp"), lines(tags, "tag")),
    )
    convert_movielens(made, tmp_path, nothing)
    assert rows(tmp_path / "ratings.parquet") == wanted
    assert rows(tmp_path / "tags.parquet") == tags


def test_real_texts_are_as_the_converters_would_leave_them(real: Callable[[str], list[dict[str, Any]]]) -> None:
    articles, papers = real("huffpost-news/huffpost_news.parquet"), real("acl-titles/acl_titles.parquet")
    assert all(clean_text(row[name]) == row[name] for row in articles for name in ("headline", "description"))
    assert all(clean_text(title) == title for title in {row["title"] for row in papers})
    for found in (articles, papers):
        order = [(row["user_id"], row["timestamp"], row["item_id"]) for row in found]
        assert order == sorted(order)


def test_git_s_own_history_follows_the_rules_of_from_git(real: Callable[[str], list[dict[str, Any]]]) -> None:
    found = real("git-commits/git_commits.parquet")
    assert all(prefix_of(row["subject"]) == row["prefix"] for row in found)
    # A cut body may end in what looks like a trailer; git:// is masked here, and was not there.
    bodies = [row["body"] for row in found if len(row["body"]) < 790 and "git://" not in row["body"]]
    kept = sum(clean_body(body.split("\n"), 800) == body for body in bodies)
    assert kept / len(bodies) > 0.998  # the rest ends in rare trailers, as "Best-viewed-with: --color-words"
    assert sum(mask_addresses(body) != body for body in bodies) < 10  # message ids, which look like addresses
