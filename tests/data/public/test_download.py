"""Downloads against a real server: whole, resumed, broken off, refused, changed."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path
from typing import Any

import pytest

from proper.data.public.download import SUMS, download, require_json
from proper.errors import InputError, ProperError

BODY = b"[" + b", ".join(b'{"n": %d}' % n for n in range(50_000)) + b"]\n"


class Watched:
    """What a progress bar would have been told."""

    def __init__(self) -> None:
        self.total: int | None = None
        self.began = self.moved = 0

    def started(self, total: int | None, done: int) -> None:
        self.total, self.began = total, done

    def advanced(self, more: int) -> None:
        self.moved += more


def fetch(site: Any, path: Path, name: str = "file.json") -> Watched:
    watched = Watched()
    assert download(f"{site.url}/{name}", path, watched.started, watched.advanced, require_json)
    return watched


def fails(site: Any, path: Path, kind: type[ProperError] = ProperError, name: str = "file.json") -> str:
    with pytest.raises(kind) as caught:
        fetch(site, path, name)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert not path.exists() or kind is InputError
    return str(caught.value)


@pytest.fixture
def here(site: Any, tmp_path: Path) -> Path:
    (site.folder / "file.json").write_bytes(BODY)
    return tmp_path / "out" / "file.json"


def left(here: Path) -> set[str]:
    return {path.name for path in here.parent.iterdir()}


def test_a_file_arrives_whole_with_its_checksum_and_nothing_else(site: Any, here: Path) -> None:
    watched = fetch(site, here)
    assert here.read_bytes() == BODY
    assert (here.parent / SUMS).read_text() == f"{hashlib.sha256(BODY).hexdigest()}  file.json\n"
    assert left(here) == {"file.json", SUMS}
    assert (watched.total, watched.began, watched.moved) == (len(BODY), 0, len(BODY))


def test_what_broke_off_goes_on_where_it_stopped(site: Any, here: Path) -> None:
    site.break_after = 300_000
    said = fails(site, here)
    assert "broke off after 300,000 of" in said
    assert left(here) == {"file.json.part", "file.json.part.etag"}
    site.break_after = None
    watched = fetch(site, here)
    assert site.asked[-1] == ("/file.json", "bytes=300000-", 206)
    assert (watched.total, watched.began, watched.moved) == (len(BODY), 300_000, len(BODY) - 300_000)
    assert here.read_bytes() == BODY
    assert left(here) == {"file.json", SUMS}


@pytest.mark.parametrize("lacks", ["ranges", "tags"])
def test_a_server_that_cannot_resume_sends_all_of_it_again(site: Any, here: Path, lacks: str) -> None:
    setattr(site, lacks, False)
    site.break_after = 300_000
    fails(site, here)
    site.break_after = None
    fetch(site, here)
    assert site.asked[-1][2] == 200
    assert here.read_bytes() == BODY


def test_a_file_that_changed_in_between_is_not_patched_together(site: Any, here: Path) -> None:
    site.break_after = 300_000
    fails(site, here)
    site.break_after = None
    other = BODY.replace(b"n", b"m")
    (site.folder / "file.json").write_bytes(other)
    fetch(site, here)
    assert here.read_bytes() == other


def test_a_part_that_was_whole_when_the_process_died_is_taken(site: Any, here: Path) -> None:
    site.break_after = len(BODY) - 1
    fails(site, here)
    part = here.with_name("file.json.part")
    part.write_bytes(BODY)
    fetch(site, here)
    assert site.asked[-1][2] == 416
    assert here.read_bytes() == BODY


def test_what_is_there_is_checked_and_not_asked_for(site: Any, here: Path) -> None:
    fetch(site, here)
    asked = len(site.asked)
    assert not download(f"{site.url}/file.json", here, Watched().started, Watched().advanced, require_json)
    assert len(site.asked) == asked
    here.write_bytes(BODY + b" ")
    assert "has changed since it was fetched" in fails(site, here, InputError)
    (here.parent / SUMS).unlink()
    assert "does not list it; move it away" in fails(site, here, InputError)
    assert here.read_bytes() == BODY + b" "


def test_a_checksum_that_is_known_must_be_met(site: Any, here: Path) -> None:
    here.parent.mkdir()
    (here.parent / SUMS).write_text(f"{'0' * 64} *file.json\n")
    assert "lists 000000000000..." in fails(site, here)
    assert left(here) == {SUMS, "file.json.part.etag"}
    (here.parent / SUMS).write_text("nonsense\n")
    assert f"{SUMS}:1: not a line of sha256sum" in fails(site, here, InputError)


def test_what_is_not_there(site: Any, here: Path) -> None:
    assert fails(site, here, name="other.json") == f"{site.url}/other.json: 404 Not Found"
    assert not here.with_name("file.json.part").exists()


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><html>not found</html>", b'[{"cut": ', b""])
def test_a_page_in_place_of_json_is_refused(site: Any, here: Path, page: bytes) -> None:
    site.page = page
    assert "the server did not send JSON" in fails(site, here, name="wrong/file.json")
    assert not here.with_name("file.json.part").exists()


def test_nobody_answers(site: Any, here: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        site.url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        assert fails(site, here) == f"{site.url}/file.json: cannot be reached: Connection refused"


def test_a_server_that_hangs_up_without_a_word(site: Any, here: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        import threading

        def hang_up() -> None:
            connection, _ = mute.accept()
            connection.recv(1 << 16)
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        site.url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        assert "cannot be reached" in fails(site, here)
        thread.join()


def test_a_full_disk_is_named_and_the_target_is_untouched(site: Any, here: Path) -> None:
    here.parent.mkdir()
    # Everything written to /dev/full fails as on a full disk.
    here.with_name("file.json.part").symlink_to("/dev/full")
    assert "the disk is full; make room" in fails(site, here)


def test_a_folder_that_cannot_be_made(site: Any, tmp_path: Path, here: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ProperError, match="out"):
        fetch(site, here)
