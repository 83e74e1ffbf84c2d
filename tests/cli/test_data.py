"""`proper data list|fetch|convert`: the license, the addresses, the outcome of each kind of failure."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from proper.cli.app import main
from proper.config.lamp_tasks import LAMP_TASKS
from proper.data.public.lamp import SITE, fetchable_task, file_urls
from tests import lamp_files

Output = pytest.CaptureFixture[str]
NAMES = ("train_questions.json", "train_outputs.json", "dev_questions.json", "dev_outputs.json")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def lamp_site(site: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A site with LaMP-3 by user."""
    written = lamp_files.write_lamp(tmp_path / "made", "lamp-3")
    for name in NAMES:
        place = site.folder / "LaMP_3" / name.partition("_")[0] / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes((written / name).read_bytes())
    monkeypatch.setenv("PROPER_LAMP_SITE", site.url)
    monkeypatch.chdir(tmp_path)
    return site


def test_a_task_arrives_and_its_folder_is_printed(lamp_site: Any, capsys: Output) -> None:
    assert main(["data", "fetch", "LaMP_3", "--yes"]) == 0
    out, err = capsys.readouterr()
    assert out == "data/lamp-3\n"
    assert "CC BY-NC-SA 4.0" in err
    assert "fetch dev_questions.json, KiB: " in err
    assert {path.name for path in Path("data/lamp-3").iterdir()} == {*NAMES, "SHA256SUMS"}
    asked = len(lamp_site.asked)
    assert main(["data", "fetch", "lamp-3", "--yes"]) == 0
    assert "data/lamp-3/dev_outputs.json: already fetched, and unchanged" in capsys.readouterr().err
    assert len(lamp_site.asked) == asked


def test_the_license_is_shown_and_asked_about_first(
    lamp_site: Any, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["data", "fetch", "lamp-3"]) == 2
    out, err = capsys.readouterr()
    assert (out, lamp_site.asked) == ("", [])
    assert "by-nc-sa" in err
    assert err.endswith("proper: the license must be agreed to; --yes agrees without a terminal\n")
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    assert main(["data", "fetch", "lamp-3"]) == 1
    assert capsys.readouterr().err.endswith("Agree and fetch? [y/N]: proper: not agreed to; nothing was fetched\n")
    assert lamp_site.asked == []
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    assert main(["data", "fetch", "lamp-3", "--out", "here"]) == 0
    assert capsys.readouterr().out == "here\n"


def test_what_broke_off_goes_on_by_the_same_command(lamp_site: Any, capsys: Output) -> None:
    lamp_site.break_after = 500
    assert main(["data", "fetch", "lamp-3", "--yes"]) == 1
    assert "broke off after 500 of" in capsys.readouterr().err.splitlines()[-1]
    lamp_site.break_after = None
    assert main(["data", "fetch", "lamp-3", "--yes"]) == 0
    assert (lamp_site.asked[1][1], lamp_site.asked[1][2]) == ("bytes=500-", 206)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["lamp-3", "--split", "time"], 1, "/time/LaMP_3/train/train_questions.json: 404 Not Found"),
        (["lamp-3", "--site", "http://127.0.0.1:9"], 1, "cannot be reached: Connection refused"),
        (["lamp-3", "--site", "file:///etc"], 2, "--site file:///etc: not a web address (https://...)"),
        (["lamp-8"], 2, "no data set 'lamp-8'; `proper data list` shows their names"),
        (["lamp-6"], 2, "lamp-6: needs the Avocado mails (LDC2015T03), which are not public"),
        (["lamp-3", "--split", "item"], 2, "Invalid value for '--split'"),
        (["lamp-3", "--out", "made/train_questions.json"], 1, "File exists"),
    ],
)
def test_each_failure_is_one_line(lamp_site: Any, capsys: Output, arguments: list[str], code: int, says: str) -> None:
    assert main(["data", "fetch", *arguments, "--yes"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("proper: ")
    assert says in line


def test_the_addresses_are_the_site_s() -> None:
    assert file_urls(LAMP_TASKS["lamp-2m"], "user")["dev_outputs.json"] == f"{SITE}/LaMP_2/new/dev/dev_outputs.json"
    assert file_urls(LAMP_TASKS["lamp-2n"], "time", "http://x/") == {
        name: f"http://x/time/LaMP_2/{name.partition('_')[0]}/{name}" for name in NAMES
    }
    assert fetchable_task("LaMP-5").site == "LaMP_5"


@pytest.fixture
def films(site: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A site with an archive like GroupLens's; `films.md5(text)` publishes a checksum beside it."""
    with zipfile.ZipFile(site.folder / "ml-latest-small.zip", "w") as archive:
        archive.writestr("ml/movies.csv", "movieId,title,genres\n1,Toy Story (1995),Comedy|Fantasy\n")
        archive.writestr("ml/ratings.csv", "userId,movieId,rating,timestamp\n1,1,4.0,964982703\n")
        archive.writestr("ml/tags.csv", "userId,movieId,tag,timestamp\n1,1,pixar,1139045764\n")
    digest = hashlib.md5((site.folder / "ml-latest-small.zip").read_bytes()).hexdigest()
    published = site.folder / "ml-latest-small.zip.md5"
    published.write_text(f"MD5 (ml-latest-small.zip) = {digest}\n")
    monkeypatch.chdir(tmp_path)
    return site


MADE = {"LICENSE.txt", "SHA256SUMS", "ml-latest-small.zip", "ratings.parquet", "tags.parquet"}


def fetch_films(site: Any, *more: str) -> int:
    return main(["data", "fetch", "movielens-small", "--yes", "--url", f"{site.url}/ml-latest-small.zip", *more])


def test_a_public_set_is_fetched_compared_and_converted(films: Any, capsys: Output) -> None:
    assert fetch_films(films) == 0
    out, err = capsys.readouterr()
    assert out == "data/movielens-small\n"
    assert 0 < err.index("no commercial") < err.index("fetch ml-latest-small.zip, KiB")
    assert "data/movielens-small/ratings.parquet: 1 rows" in err
    folder = Path("data/movielens-small")
    assert {path.name for path in folder.iterdir()} == MADE
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    asked = len(films.asked)
    assert fetch_films(films) == 0
    assert "data/movielens-small: already fetched, and unchanged" in capsys.readouterr().err
    assert len(films.asked) == asked


def test_an_interrupted_fetch_resumes_and_then_converts(films: Any, capsys: Output) -> None:
    films.break_after = 100
    assert fetch_films(films, "--out", "here") == 1
    assert "broke off after 100 of" in capsys.readouterr().err.splitlines()[-1]
    assert not list(Path("here").glob("*.parquet"))
    films.break_after = None
    assert fetch_films(films, "--out", "here") == 0
    assert [each[1] for each in films.asked if each[0].endswith("zip")] == [None, "bytes=100-"]
    assert {path.name for path in Path("here").iterdir()} == MADE


def test_the_published_md5_decides(films: Any, capsys: Output) -> None:
    published = films.folder / "ml-latest-small.zip.md5"
    published.write_text("0" * 32)
    assert fetch_films(films) == 1
    assert f"says {'0' * 32}; fetch it again" in capsys.readouterr().err.splitlines()[-1]
    assert {path.name for path in Path("data/movielens-small").iterdir()} <= {"ml-latest-small.zip.part.etag"}
    published.unlink()
    assert fetch_films(films) == 0
    assert "ml-latest-small.zip.md5: not there, so the file is not compared" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["movielens-small", "--url", "ftp://x"], 2, "--url ftp://x: not a web address (https://...)"),
        (["acl-titles", "--url", "{site}/ml-latest-small.zip"], 1, "the server did not send a gzip file"),
        (["movielens-small", "--url", "{site}/ml-latest-small.zip.md5"], 1, "the server did not send a ZIP archive"),
        (["movielens-small", "--url", "{site}/no.zip"], 1, "/no.zip: 404"),
        (
            ["huffpost-news"],
            2,
            "then run: proper data convert huffpost-news News_Category_Dataset_v3.json --out data/huff",
        ),
        (["movielens"], 2, "no data set 'movielens'; `proper data list` shows their names"),
    ],
)
def test_each_failure_of_a_public_set_is_one_line(
    films: Any, capsys: Output, arguments: list[str], code: int, says: str
) -> None:
    assert main(["data", "fetch", *(each.format(site=films.url) for each in arguments), "--yes"]) == code
    out, err = capsys.readouterr()
    assert out == "" and says in err.splitlines()[-1]
    assert not list(Path().glob("data/*/*.parquet"))


def test_nobody_agrees_to_a_license_for_nothing(films: Any, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["data", "fetch", "huffpost-news"]) == 2
    assert "needs an account" in capsys.readouterr().err
    assert fetch_films(films) == 0
    assert main(["data", "fetch", "movielens-small"]) == 0  # fetched already
    Path("data/movielens-small/tags.parquet").unlink()
    assert main(["data", "fetch", "movielens-small"]) == 2
    assert "the license must be agreed to" in capsys.readouterr().err


def test_files_from_elsewhere_are_not_overwritten(films: Any, capsys: Output) -> None:
    mine = Path("data/movielens-small/ratings.parquet")
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert fetch_films(films) == 2
    assert "ratings.parquet: exists, but SHA256SUMS beside it does not list it" in capsys.readouterr().err
    assert mine.read_text() == "mine" and films.asked == []


def test_a_file_downloaded_by_hand_is_converted(films: Any, capsys: Output) -> None:
    article = {
        "link": "x/y",
        "headline": "H",
        "category": "ARTS",
        "short_description": "",
        "authors": "A",
        "date": "2020-01-01",
    }
    Path("News_Category_Dataset_v3.json").write_text(json.dumps(article) + "\n")
    assert main(["data", "convert", "huffpost-news", "News_Category_Dataset_v3.json"]) == 0
    out, err = capsys.readouterr()
    assert out == "data/huffpost-news\n" and "CC BY" in err and "huffpost_news.parquet: 1 rows" in err
    assert main(["data", "convert", "huffpost-news", "no.json"]) == 2
    assert capsys.readouterr().err.endswith("no.json: no such file\n")
    assert main(["data", "convert", "lamp-3", "no.json"]) == 2
    assert "known: movielens-small, huffpost-news, acl-titles" in capsys.readouterr().err


def test_the_list_names_every_set_with_its_license(capsys: Output) -> None:
    assert main(["data", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        *("movielens-small", "huffpost-news", "acl-titles"),
        *("lamp-1", "lamp-2m", "lamp-2n", "lamp-3", "lamp-4", "lamp-5", "lamp-7"),
    ]
    assert all("CC BY" in line or "GroupLens" in line for line in lines)
