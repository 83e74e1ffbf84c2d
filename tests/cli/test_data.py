"""`proper data fetch`: the license, the addresses, the outcome of each kind of failure."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from proper.cli.app import main
from proper.data.public.lamp import SITE, fetchable_task, file_urls
from proper.lamp_tasks import LAMP_TASKS

Output = pytest.CaptureFixture[str]
NAMES = ("train_questions.json", "train_outputs.json", "dev_questions.json", "dev_outputs.json")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def lamp_site(site: Any, lamp_files: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
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
    assert "data/lamp-3/dev_outputs.json: is there, and as it was fetched" in capsys.readouterr().err
    assert len(lamp_site.asked) == asked


def test_the_license_is_shown_and_asked_about_first(
    lamp_site: Any, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["data", "fetch", "lamp-3"]) == 2
    out, err = capsys.readouterr()
    assert (out, lamp_site.asked) == ("", [])
    assert "by-nc-sa" in err
    assert err.endswith("proper: the license has to be agreed to; --yes does so where nobody can be asked\n")
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
        (["lamp-8"], 2, "no data set 'lamp-8'; known: lamp-1, lamp-2m, lamp-2n, lamp-3, lamp-4, lamp-5, lamp-7"),
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
