"""`proper data from-git`: a real repository becomes rows of users, without names, addresses or trailers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from proper.cli.app import main
from proper.config import load_config
from proper.data.interactions import BadRows, read_interactions
from proper.data.public.git_history import area_of, clean_body, prefix_of

Output = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[3]
LONG = "Because twelve words are what a body needs before it says why it is."


def commit(folder: Path, who: str, message: str, at: int, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    date = {f"GIT_{role}_DATE": f"{at} +0200" for role in ("AUTHOR", "COMMITTER")}
    names = {f"GIT_{role}_{part}": who for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}
    clean = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    for words in (["add", "-A"], ["commit", "-q", "-m", message]):
        subprocess.run(["git", "-C", str(folder), *words], check=True, env={**os.environ, **date, **names, **clean})


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    signed = "Signed-off-by: Ann <ann@example.org>\nReviewed-by: Ben <ben@example.org>"
    commit(
        folder, "Ann@example.org", f"refs: pack tighter\n\n{LONG}\n\n{signed}", 1_000_000_000, {"refs/a.c": "1\n2\n"}
    )
    commit(
        folder,
        "ben@example.org",
        f"Say hello\n\n{LONG} Mail ann@example.org, see https://example.org/x",
        10**9 + 60,
        {"b": "1"},
    )
    commit(folder, "ben@example.org", "Too short\n\nNo reason.", 10**9 + 120, {"b": "2"})
    commit(folder, "ann@example.org", f"refs: pack tighter\n\n{LONG} Again.", 10**9 + 180, {"refs/a.c": "3"})
    return folder


def rows(file: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(file).to_pylist())


def test_commits_become_rows_of_pseudonymous_users(repository: Path, tmp_path: Path, capsys: Output) -> None:
    assert main(["data", "from-git", str(repository), "--out", str(tmp_path / "x.parquet")]) == 0
    assert "2 of 4 commits by 2 authors" in capsys.readouterr().err
    first, second = rows(tmp_path / "x.parquet")
    assert (first["subject"], first["prefix"], first["area"]) == ("refs: pack tighter", "refs", "refs")
    assert first["body"] == LONG and first["timestamp"] == "2001-09-09T01:46:40Z"
    assert (second["prefix"], second["area"]) == ("", ".")
    assert second["body"] == f"{LONG} Mail [email], see [url]"
    assert first["user_id"] != second["user_id"]
    assert b"example.org" not in (tmp_path / "x.parquet").read_bytes()


@pytest.mark.parametrize("date", ["", " 99999999999999 +0000"])
def test_commits_without_a_date_or_with_an_impossible_one_are_left_out(
    repository: Path, tmp_path: Path, date: str, capsys: Output
) -> None:
    git = ["git", "-C", str(repository)]
    tree, parent = subprocess.check_output([*git, "rev-parse", "HEAD^{tree}", "HEAD"], text=True).split()
    raw = f"tree {tree}\nparent {parent}\nauthor A <a@b.c>{date}\ncommitter A <a@b.c> 1 +0000\n\nOdd\n\n{LONG} Odd.\n"
    store = [*git, "hash-object", "-t", "commit", "-w", "--stdin", "--literally"]
    made = subprocess.check_output(store, input=raw, text=True).strip()
    subprocess.run([*git, "reset", "-q", "--soft", made], check=True)
    assert main(["data", "from-git", str(repository), "--out", str(tmp_path / "x.parquet")]) == 0
    assert "2 of 5 commits by 2 authors" in capsys.readouterr().err
    assert "Odd" not in {row["subject"] for row in rows(tmp_path / "x.parquet")}


def test_the_same_author_has_one_id_and_another_salt_another(repository: Path, tmp_path: Path) -> None:
    found = []
    for salt in ("", "", "else"):
        options = ["--min-words", "1", *(["--salt", salt] if salt else [])]
        assert main(["data", "from-git", str(repository), "--out", str(tmp_path / "x.parquet"), *options]) == 0
        found.append([row["user_id"] for row in rows(tmp_path / "x.parquet")])
    assert found[0] == found[1] and len(set(found[0])) == 2
    assert not set(found[0]) & set(found[2])


def test_another_name_than_that_of_a_parquet_file_is_refused(repository: Path, tmp_path: Path, capsys: Output) -> None:
    """A config would read a file called x.csv as CSV."""
    assert main(["data", "from-git", str(repository), "--out", str(tmp_path / "x.csv")]) == 2
    assert "x.csv: the file is Parquet" in capsys.readouterr().err and not (tmp_path / "x.csv").exists()


@pytest.mark.parametrize("options", [[], ["--min-words", "99"]])
def test_nothing_to_write_is_one_line(repository: Path, tmp_path: Path, options: list[str], capsys: Output) -> None:
    where = repository if options else tmp_path / "nothing"
    where.mkdir(exist_ok=True)
    assert main(["data", "from-git", str(where), "--out", str(tmp_path / "x.parquet"), *options]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(where) in last and not (tmp_path / "x.parquet").exists()


def test_only_whole_paragraphs_of_trailers_go() -> None:
    assert (
        clean_body(["Fix: this.", "", "Note: a sentence", "that goes on."], 99)
        == "Fix: this.\n\nNote: a sentence\nthat goes on."
    )
    assert clean_body(["Why.", "", "Acked-by: X", "(cherry picked from commit 0a1b)"], 99) == "Why."
    assert clean_body(["Why.", "", "Workaround: copy it."], 99) == "Why.\n\nWorkaround: copy it."
    assert clean_body(["abcdef"], 3) == "abc"


def test_the_prefix_is_what_stands_before_the_first_colon() -> None:
    assert prefix_of("refs.c::read_ref_at(): fix it") == "refs.c::read_ref_at()"
    assert prefix_of("[PATCH 2/2] tests: more: of them") == "[PATCH 2/2] tests"
    assert prefix_of("no prefix") == prefix_of(f"{'x' * 31}: too long") == prefix_of("a:b") == ""


def test_the_area_is_the_folder_with_most_changed_lines() -> None:
    assert area_of(["1\t1\ta/x", "5\t0\tb/y", "-\t-\tc.png"]) == "b"
    assert area_of([]) == "."


def test_the_configs_read_what_is_made(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.chdir(tmp_path)
    made = Path("data/git-commits/git_commits.parquet")
    made.parent.mkdir(parents=True)
    assert main(["data", "from-git", str(repository), "--out", str(made)]) == 0
    capsys.readouterr()
    answers = {"git-commits": {"refs: pack tighter", "Say hello"}, "git-area": {"refs", "."}}
    for name, targets in answers.items():
        config, bad = load_config(ROOT / "configs" / f"{name}.yaml"), BadRows()
        found = list(read_interactions(config.data, bad, config.task))
        assert ({row.target for row in found}, bad.count) == (targets, 0)
        assert all(row.time is not None and row.item and LONG in row.prompt for row in found)
