"""Files are whole or absent, whatever goes wrong while they are written."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from proper.errors import ProperError
from proper.files import (
    atomic_folder,
    atomic_path,
    close_to_others,
    hash_file,
    hash_value,
    open_private,
    private_folder,
    read_json,
    write_json,
    write_text,
)


def test_a_new_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert os.listdir(path.parent) == ["a.txt"]


def test_a_failure_leaves_the_old_file_and_no_traces(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    # A limit on the size of files is as close to a full disk as a test can come without a disk of its own.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(ProperError) as caught:
            write_text(path, "new" * 10_000)
        said = f"{path}: cannot be written: .*{os.strerror(errno.EFBIG)}"
        with pytest.raises(ProperError, match=said), atomic_path(path) as temporary:
            save_file({"a": np.zeros(10_000)}, temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(caught.value) == f"{path}: cannot be written: {os.strerror(errno.EFBIG)}"
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    code = (
        "import os, pathlib, signal, sys; from proper.files import atomic_path\n"
        "with atomic_path(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('new'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0, 0o666, 0o777)])
def test_files_are_the_owners_and_shared_ones_as_the_umask_says(
    tmp_path: Path, umask: int, file: int, folder: int
) -> None:
    before = os.umask(umask)
    try:
        for shared, wanted in ((False, (0o600, 0o700)), (True, (file, folder))):
            home = tmp_path / str(shared)
            write_text(home / "a.txt", "x", shared=shared)
            with atomic_folder(home / "out", shared=shared) as place:
                (place / "inner").mkdir()
                (place / "inner" / "b").write_text("1")
            out = home / "out"
            assert (mode(home / "a.txt"), mode(home)) == wanted
            assert (mode(out / "inner" / "b"), mode(out / "inner")) == wanted == (mode(home / "a.txt"), mode(out))
    finally:
        os.umask(before)


def test_a_file_that_everybody_could_read_is_the_owners_when_it_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o644)
    write_text(path, "new")
    assert mode(path) == 0o600


def test_an_open_folder_is_closed_and_one_for_a_group_stays(tmp_path: Path) -> None:
    for before, after in ((0o755, 0o700), (0o777, 0o700), (0o750, 0o750), (0o700, 0o700)):
        folder = tmp_path / f"{before:o}"
        folder.mkdir()
        folder.chmod(before)
        private_folder(folder)
        assert mode(folder) == after
    victim, link = tmp_path / "victim", tmp_path / "link"
    victim.mkdir()
    victim.chmod(0o755)
    link.symlink_to(victim)
    close_to_others(link)
    assert mode(victim) == 0o755


def test_a_private_file_is_not_opened_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="is a symbolic link"):
        open_private(tmp_path / "link", os.O_RDWR | os.O_CREAT)
    assert not (tmp_path / "victim").exists()


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(json_values)
def test_json_comes_back_as_it_went(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.json"
    write_json(path, value)
    assert read_json(path) == value


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), st.integers(), min_size=2, max_size=5))
def test_a_hash_does_not_depend_on_the_order_of_keys(value: dict[str, int]) -> None:
    assert hash_value(value) == hash_value(dict(reversed(value.items())))
    assert hash_value(value) != hash_value({**value, next(iter(value)): "other"})


def test_nan_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"x": float("nan")})
    assert read_json(path) == {"x": 1}


@pytest.mark.parametrize("content", [b"{", b"", b'"\xff"', b"[" * 100_000, b"1" * 5_000])
def test_what_is_not_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ProperError, match=r"a\.json: not readable as JSON"):
        read_json(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProperError, match=r"gone\.json: no such file"):
        read_json(tmp_path / "gone.json")


def test_a_file_is_hashed_over_all_its_bytes(tmp_path: Path) -> None:
    content = os.urandom((1 << 20) + 17)
    (tmp_path / "a.bin").write_bytes(content)
    assert hash_file(tmp_path / "a.bin") == hashlib.sha256(content).hexdigest()


def test_a_new_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    with atomic_folder(path) as temporary:
        (temporary / "a").write_text("1")
        assert not path.exists()
    assert os.listdir(path) == ["a"]
    with atomic_folder(path) as temporary:
        (temporary / "b").write_text("2")
        assert os.listdir(path) == ["a"]
    assert os.listdir(path) == ["b"]
    assert os.listdir(path.parent) == ["out"]


def test_a_failure_leaves_the_old_folder_and_no_traces(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for existed in (False, True):
        with pytest.raises(ZeroDivisionError), atomic_folder(path) as temporary:
            (temporary / "new").write_text("half")
            raise ZeroDivisionError
        assert os.listdir(tmp_path) == (["out"] if existed else [])
        path.mkdir(exist_ok=True)
    assert os.listdir(path) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ProperError, match="file/out: cannot be written"), atomic_folder(tmp_path / "file" / "out"):
        pass
