"""Resumable HTTP download of one JSON file, verified by checksum and moved into place only when complete.

Checksums are kept in `SHA256SUMS` beside the files, in the format of `sha256sum`.
"""

from __future__ import annotations

import errno
import http.client
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from proper.errors import InputError, ProperError
from proper.files import hash_file, write_text

SUMS = "SHA256SUMS"
_PIECE = 1 << 18
_SECONDS = 60.0

Started = Callable[[int | None, int], None]
"""`started(total, done)`: bytes of the whole file (None if the server does not say), and bytes already present."""
Advanced = Callable[[int], None]


def download(url: str, path: Path, started: Started, advanced: Advanced) -> bool:
    """Download `url` to `path`; return False if the file is already there, complete and unchanged.

    A partial download is kept in `NAME.part` and resumed if the server's file is still the same. A checksum that
    `SHA256SUMS` already lists must match.

    Raises:
        InputError: `path` exists and was not downloaded by this function, or has changed since.
        ProperError: the server cannot be reached or refuses, the file is not the expected one, or the disk is full.
    """
    known = read_sums(path.parent).get(path.name)
    if path.exists():
        _check_present(path, known)
        return False
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _transfer(url, part, started, advanced)
        _check_json(url, part)
        found = hash_file(part)
        if known is not None and found != known:
            part.unlink()
            raise ProperError(f"{url}: sha256 is {found[:12]}..., {path.parent / SUMS} wants {known[:12]}...")
        # Write the checksum first: if the process is killed in between, the next call only renames the complete part.
        _add_sum(path, found)
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:
        raise ProperError(_explain(error, url, part)) from error
    _tag(part).unlink(missing_ok=True)
    return True


def read_sums(folder: Path) -> dict[str, str]:
    """Return the checksums in a folder's `SHA256SUMS` by file name; empty if there is no such file."""
    path = folder / SUMS
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line) for line in lines if line.strip()]
    for number, pair in enumerate(pairs, 1):
        if pair is None:
            raise InputError(f"{path}:{number}: not a line of sha256sum")
    return {pair[2]: pair[1] for pair in pairs if pair is not None}


def _add_sum(path: Path, found: str) -> None:
    sums = {**read_sums(path.parent), path.name: found}
    write_text(path.parent / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())), shared=True)


def _check_present(path: Path, known: str | None) -> None:
    if known is None:
        raise InputError(f"{path}: is there, and {path.parent / SUMS} does not know it; move it away to fetch it")
    if hash_file(path) != known:
        raise InputError(f"{path}: is not what was fetched, see {SUMS}; delete it to fetch it again")


def _tag(part: Path) -> Path:
    """Return the path of the file that keeps the server's ETag while the download is incomplete."""
    return part.with_name(part.name + ".etag")


def _transfer(url: str, part: Path, started: Started, advanced: Advanced) -> None:
    tag = _tag(part)
    held = part.stat().st_size if part.exists() and tag.is_file() else 0
    headers = {"Range": f"bytes={held}-", "If-Range": tag.read_text(encoding="utf-8")} if held else {}
    try:
        response = urlopen(Request(url, headers={"User-Agent": "proper", **headers}), timeout=_SECONDS)
    except HTTPError as error:
        with error:
            # 416 with this range: the part is already complete.
            if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{held}":
                started(held, held)
                return
        raise ProperError(f"{url}: {error.code} {error.reason}") from error
    with response:
        held = _begin(response, held)
        version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        if version and not version.startswith("W/"):
            write_text(tag, version, shared=True)
        else:
            tag.unlink(missing_ok=True)
        total = _total(response, held)
        started(total, held)
        with part.open("ab" if held else "wb") as file:
            _copy(url, response, file, total, advanced)
            file.flush()
            os.fsync(file.fileno())


def _begin(response: Any, held: int) -> int:
    """Return the offset at which the response starts: 0 if the server cannot resume or its file has changed."""
    sent = re.match(r"bytes (\d+)-", response.headers.get("Content-Range") or "")
    return held if response.status == 206 and sent is not None and int(sent[1]) == held else 0


def _total(response: Any, held: int) -> int | None:
    length = response.headers.get("Content-Length")
    return held + int(length) if length and length.isdigit() else None


def _copy(url: str, response: Any, file: IO[bytes], total: int | None, advanced: Advanced) -> None:
    try:
        while piece := response.read(_PIECE):
            file.write(piece)
            advanced(len(piece))
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise ProperError(_broken(url, file.tell(), total)) from error
    if total is not None and file.tell() < total:
        raise ProperError(_broken(url, file.tell(), total))


def _broken(url: str, done: int, total: int | None) -> str:
    of = f" of {total:,}" if total is not None else ""
    return f"{url}: the connection broke off after {done:,}{of} bytes; the same command goes on from there"


def _check_json(url: str, part: Path) -> None:
    """Refuse a file that does not start and end as JSON: this site answers a wrong URL with HTML and status 200."""
    with part.open("rb") as file:
        first = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        file.seek(-min(64, part.stat().st_size), os.SEEK_END)
        last = file.read().rstrip()[-1:]
    if (first, last) not in ((b"[", b"]"), (b"{", b"}")):
        part.unlink()
        raise ProperError(f"{url}: what the server sent is not JSON; is the address right?")


def _explain(error: OSError | http.client.HTTPException, url: str, part: Path) -> str:
    if isinstance(error, URLError | ConnectionError | TimeoutError | http.client.HTTPException):
        reason = getattr(error, "reason", error)
        return f"{url}: cannot be reached: {getattr(reason, 'strerror', None) or reason or type(error).__name__}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{part}: the disk is full; make room, and the same command goes on from there"
    return f"{part}: cannot be written: {error.strerror or error}"
