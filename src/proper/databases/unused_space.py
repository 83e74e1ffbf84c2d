"""Search of the unused space of an SQLite file, where copies of deleted rows can be left, for a text.

SQLite overwrites a deleted row (`secure_delete`), but not the places from which it moved the row to other pages before:
they lie in the unused space of pages in use (https://sqlite.org/fileformat2.html, 1.6). Rows in use do not count, so
that a text that other rows contain is not found.

The module is also the script that searches, in a process of its own. POSIX locks belong to a process and a file:
closing any descriptor of the file would drop the locks of all connections of this process, and another process that
closes the file would then delete the write-ahead log under them (https://sqlite.org/howtocorrupt.html, 2.2).
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_FOUND = 3
_MAGIC = b"SQLite format 3\0"
_HEADER = 100
_TREE_PAGES = {2: 12, 5: 12, 10: 8, 13: 8}
"""The first byte of a page of a table or an index, and the length of its header."""


def is_in_unused_space(path: Path, text: str) -> bool:
    """Return whether the unused space of an SQLite file contains a text; its write-ahead log is not searched.

    Raises:
        OSError: the file cannot be read.
    """
    command = [sys.executable, "-I", "-S", __file__, str(path)]
    ended = subprocess.run(command, input=text.encode("utf-8", "surrogatepass"), capture_output=True)
    if ended.returncode not in (0, _FOUND):
        raise OSError(f"cannot be searched for a deleted user: {ended.stderr.decode(errors='replace').strip()[-200:]}")
    return ended.returncode == _FOUND


def _search(file: BinaryIO, wanted: bytes) -> bool:
    header = file.read(_HEADER)
    if not wanted or not header.startswith(_MAGIC):
        return False
    size = int.from_bytes(header[16:18], "big")
    size = 1 << 16 if size == 1 else size
    free = _free_pages(file, size, int.from_bytes(header[32:36], "big"))
    file.seek(0)
    number = 0
    while page := file.read(size):
        number += 1
        if wanted in page:
            ranges = [(0, size)] if number in free else _unused(page, _HEADER if number == 1 else 0)
            # A copy of which rows in use have overwritten a part counts, too.
            reach = len(wanted) - 1
            if any(wanted in page[max(0, first - reach) : end + reach] for first, end in ranges if first < end):
                return True
    return False


def _free_pages(file: BinaryIO, size: int, trunk: int) -> set[int]:
    """Return the numbers of the pages in the list of free pages."""
    free = set[int]()
    while trunk and trunk not in free:
        free.add(trunk)
        file.seek((trunk - 1) * size)
        page = file.read(size)
        trunk, count = _number(page, 0, 4), _number(page, 4, 4)
        free |= {_number(page, 8 + 4 * at, 4) for at in range(min(count, size // 4))}
    return free


def _unused(page: bytes, start: int) -> Iterator[tuple[int, int]]:
    """Yield the first byte and the end of each unused range of a page whose header begins at `start`."""
    length = _TREE_PAGES.get(page[start])
    if length is None:
        return  # the rest of a long row
    block, cells, content = (_number(page, start + at, 2) for at in (1, 3, 5))
    yield start + length + 2 * cells, content or 1 << 16
    while block:
        yield block, block + _number(page, block + 2, 2)
        following = _number(page, block, 2)
        block = following if following > block else 0  # the list is in order, unless it is being written


def _number(data: bytes, at: int, length: int) -> int:
    return int.from_bytes(data[at : at + length], "big")


if __name__ == "__main__":
    with Path(sys.argv[1]).open("rb") as searched:
        sys.exit(_FOUND if _search(searched, sys.stdin.buffer.read()) else 0)
