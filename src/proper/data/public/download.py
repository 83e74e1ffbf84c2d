"""Resumable HTTP download of a file, verified by content and checksum, and moved into place only when complete.

Checksums are kept in `SHA256SUMS` beside the files, in the format of `sha256sum`.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import re
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from proper.console import Advance, progress
from proper.errors import InputError, ProperError
from proper.files import hash_file, write_text

SUMS = "SHA256SUMS"
_PIECE = 1 << 18
_SECONDS = 60.0
_KIB = 1024
_HEADERS = {"User-Agent": "proper"}

Started = Callable[[int | None, int], None]
"""`started(total, done)`: bytes of the whole file (None if the server does not say), and bytes already present."""
Advanced = Callable[[int], None]
"""`advanced(more)`: more bytes have arrived."""
Verify = Callable[[str, Path], None]
"""`verify(url, file)` raises ProperError if the complete file is not what `url` should have sent."""


def fetch(url: str, path: Path, verify: Verify) -> bool:
    """Run `download` with a progress bar in KiB."""
    done = 0
    advance: Advance = _no_advance
    with ExitStack() as stack:

        def advanced(more: int) -> None:
            nonlocal done
            before, done = done // _KIB, done + more
            advance(done // _KIB - before)

        def started(total: int | None, present: int) -> None:
            # The total size is known only from the server's response.
            nonlocal advance
            units = None if total is None else total // _KIB
            advance = stack.enter_context(progress(f"fetch {path.name}, KiB", units))
            advanced(present)

        return download(url, path, started, advanced, verify)


def require_web_address(option: str, url: str) -> None:
    """Raise InputError if `url`, given as `option`, is not a web address."""
    if not url.startswith(("https://", "http://")):
        raise InputError(f"{option} {url}: not a web address (https://...)")


def _no_advance(n: int = 1, note: str = "") -> None:
    """Do nothing; the placeholder before the progress bar exists."""


def download(url: str, path: Path, started: Started, advanced: Advanced, verify: Verify) -> bool:
    """Download `url` to `path`; return False if the file is already there, complete and unchanged.

    A partial download is kept in `NAME.part` and resumed if the server's file is still the same. A complete one that
    `verify` refuses is deleted. A checksum that `SHA256SUMS` already lists must match.

    Raises:
        InputError: `path` exists and was not downloaded by this function, or has changed since.
        ProperError: the server cannot be reached or refuses, the file is not the expected one, or the disk is full.
    """
    if is_present(path):
        return False
    known = read_sums(path.parent).get(path.name)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _transfer(url, part, started, advanced)
        found = _verified(url, part, verify, path.parent, known)
        # Write the checksum first: if the process is killed in between, the next call only renames the complete part.
        add_sum(path, found)
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


def add_sum(path: Path, found: str) -> None:
    """Write the checksum of `path` into the `SHA256SUMS` beside it."""
    sums = {**read_sums(path.parent), path.name: found}
    write_text(path.parent / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())), shared=True)


def is_present(path: Path) -> bool:
    """Return whether `path` exists and is as it was fetched or made, by `SHA256SUMS`.

    Raises:
        InputError: `path` exists, but is not listed or has changed.
    """
    if not path.exists():
        return False
    known = read_sums(path.parent).get(path.name)
    if known is None:
        raise InputError(f"{path}: exists, but {SUMS} beside it does not list it; move it away or use another folder")
    if hash_file(path) != known:
        raise InputError(f"{path}: has changed since it was fetched (see {SUMS}); delete it and fetch again")
    return True


def _verified(url: str, part: Path, verify: Verify, folder: Path, known: str | None) -> str:
    """Return the checksum of a complete download; delete the file and raise ProperError if it is not the right one."""
    try:
        verify(url, part)
        found = hash_file(part)
        if known is not None and found != known:
            raise ProperError(
                f"{url}: sha256 is {found[:12]}..., {folder / SUMS} lists {known[:12]}...; delete that line to accept"
            )
    except ProperError:
        part.unlink()
        raise
    return found


def _tag(part: Path) -> Path:
    """Return the path of the file that keeps the server's ETag while the download is incomplete."""
    return part.with_name(part.name + ".etag")


def _transfer(url: str, part: Path, started: Started, advanced: Advanced) -> None:
    tag = _tag(part)
    present = part.stat().st_size if part.exists() and tag.is_file() else 0
    headers = {"Range": f"bytes={present}-", "If-Range": tag.read_text(encoding="utf-8")} if present else {}
    try:
        response = urlopen(Request(url, headers={**_HEADERS, **headers}), timeout=_SECONDS)
    except HTTPError as error:
        with error:
            # 416 with this range: the part is already complete.
            if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{present}":
                started(present, present)
                return
        raise ProperError(f"{url}: {error.code} {error.reason}") from error
    with response:
        present = _begin(response, present)
        version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        if version and not version.startswith("W/"):
            write_text(tag, version, shared=True)
        else:
            tag.unlink(missing_ok=True)
        total = _total(response, present)
        started(total, present)
        with part.open("ab" if present else "wb") as file:
            _copy(url, response, file, total, advanced)
            file.flush()
            os.fsync(file.fileno())


def _begin(response: Any, present: int) -> int:
    """Return the offset at which the response starts: 0 if the server cannot resume or its file has changed."""
    sent = re.match(r"bytes (\d+)-", response.headers.get("Content-Range") or "")
    return present if response.status == 206 and sent is not None and int(sent[1]) == present else 0


def _total(response: Any, present: int) -> int | None:
    length = response.headers.get("Content-Length")
    return present + int(length) if length and length.isdigit() else None


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
    return f"{url}: the connection broke off after {done:,}{of} bytes; run the same command again to resume"


def require_json(url: str, file: Path) -> None:
    """Refuse a file that does not start and end as JSON: some sites answer a wrong URL with HTML and status 200."""
    first, last = _ends(file)
    if (first.lstrip(b"\xef\xbb\xbf \t\r\n")[:1], last.rstrip()[-1:]) not in ((b"[", b"]"), (b"{", b"}")):
        raise ProperError(f"{url}: the server did not send JSON; check the address")


def require_gzip(url: str, file: Path) -> None:
    """Refuse a file that does not start as gzip."""
    if not _ends(file)[0].startswith(b"\x1f\x8b"):
        raise ProperError(f"{url}: the server did not send a gzip file; check the address")


def require_zip(url: str, file: Path) -> None:
    """Refuse a file that is not a complete ZIP archive."""
    if not zipfile.is_zipfile(file):
        raise ProperError(f"{url}: the server did not send a ZIP archive; check the address")


def published_md5(url: str) -> str | None:
    """Return the MD5 that a site publishes at `url` + ".md5", as 32 hex digits; None if it publishes none.

    Raises:
        ProperError: the server cannot be reached.
    """
    try:
        with urlopen(Request(url + ".md5", headers=_HEADERS), timeout=_SECONDS) as response:
            found = re.search(rb"\b[0-9a-fA-F]{32}\b", response.read(1 << 12))
    except HTTPError as error:
        with error:
            return None
    except (OSError, http.client.HTTPException) as error:
        raise ProperError(_explain(error, url + ".md5", Path())) from error
    return found[0].decode().lower() if found else None


def require_md5(url: str, file: Path, expected: str) -> None:
    """Refuse a file with another MD5 than the published one."""
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != expected:
        raise ProperError(f"{url}: md5 is {found}, but {url}.md5 says {expected}; fetch it again")


def _ends(file: Path) -> tuple[bytes, bytes]:
    """Return the first and the last 64 bytes of a file."""
    with file.open("rb") as opened:
        first = opened.read(64)
        opened.seek(-min(64, file.stat().st_size), os.SEEK_END)
        return first, opened.read()


def _explain(error: OSError | http.client.HTTPException, url: str, part: Path) -> str:
    if isinstance(error, URLError | ConnectionError | TimeoutError | http.client.HTTPException):
        reason = getattr(error, "reason", error)
        return f"{url}: cannot be reached: {getattr(reason, 'strerror', None) or reason or type(error).__name__}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{part}: the disk is full; make room and run the same command again to resume"
    return f"{part}: cannot be written: {error.strerror or error}"
