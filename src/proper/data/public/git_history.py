"""Dataset from a git repository: one row per commit, the author as user, for the tasks `body -> subject` and `area`.

Author ids are pseudonyms: keyed hashes of email addresses. Email addresses and URLs in messages are masked, trailers
are removed.
"""

from __future__ import annotations

import re
import subprocess
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from proper.data.public.cleaning import mask_addresses
from proper.errors import InputError
from proper.files import atomic_path

# A trailer's key has a hyphen (Signed-off-by) or is one of a few words: a sentence may begin with "Workaround:".
_TRAILER = re.compile(
    r"^((?:[A-Z][A-Za-z0-9]*(?:-[A-Za-z0-9]+)+|C[Cc]|From|Author|Fixes|Closes|Link|Bug|Refs?): \S.*"
    r"|\(cherry picked from commit [0-9a-f]+\)|\s+\S.*)$"
)
_PREFIX = re.compile(r"(.{1,30}?):\s")


@dataclass(frozen=True)
class CommitFilter:
    """Selection and truncation of commits.

    Attributes:
        min_words: minimum words of a body.
        max_chars: characters at which a body is truncated.
        salt: key of the author pseudonyms; the same salt gives the same ids for another repository.
    """

    min_words: int = 12
    max_chars: int = 800
    salt: str = ""


@dataclass(frozen=True)
class Commit:
    """One row of the dataset. `area` is the top-level folder with the most changed lines, "." for the root."""

    user_id: str
    item_id: str
    timestamp: str
    subject: str
    body: str
    prefix: str
    area: str


def write_git_history(
    repository: Path, out: Path, wanted: CommitFilter, step: Callable[[], None] = lambda: None
) -> tuple[int, int]:
    """Write a repository's commits as Parquet, oldest first; return the numbers of rows and of authors.

    Args:
        repository: a work tree, a bare repository, or a folder inside one.
        out: the Parquet file, written atomically.
        wanted: selection of commits.
        step: called once per commit read.

    Raises:
        InputError: git is not installed, `repository` is not a git repository, or no commit qualifies.
    """
    seen: set[str] = set()
    rows = []
    for commit in read_commits(repository, wanted, step):
        # A repeated subject is a re-sent or reverted change: it would put the answer of a query into a history.
        if commit.subject not in seen:
            seen.add(commit.subject)
            rows.append(asdict(commit))
    if not rows:
        raise InputError(f"{repository}: no commit has a body of at least {wanted.min_words} words; see --min-words")
    with atomic_path(out) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")
    return len(rows), len({row["user_id"] for row in rows})


def count_commits(repository: Path) -> int:
    """Return the number of commits reachable from HEAD, without merges.

    Raises:
        InputError: no git, or no repository with commits there.
    """
    return int(_git(repository, "rev-list", "--count", "--no-merges", "HEAD"))


def read_commits(repository: Path, wanted: CommitFilter, step: Callable[[], None]) -> Iterator[Commit]:
    """Yield the commits that qualify and have a date, oldest first; memory holds one commit.

    Raises:
        InputError: no git, or no repository with commits there.
    """
    # A message may contain any character, so the separators are random and new for each call.
    first, between = f"commit {uuid.uuid4().hex}", f"field {uuid.uuid4().hex}"
    form = "%n" + first + "%n" + (between + "%n").join(("%H%n", "%aE%n", "%at%n", "%s%n", "%b%n", ""))
    salt = wanted.salt or _git(repository, "rev-list", "--max-parents=0", "HEAD").split()[-1]
    options = ("--no-merges", "--reverse", "--numstat", "--no-renames", "--encoding=UTF-8", f"--format=tformat:{form}")
    command = ["git", "-C", str(repository), "-c", "core.quotePath=false", "log", *options, "HEAD", "--"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        record: list[str] = []
        for line in (raw.decode("utf-8", "replace").rstrip("\n") for raw in process.stdout):
            if line != first:
                record.append(line)
                continue
            yield from _parse(record, between, wanted, salt, step)
            record = []
        yield from _parse(record, between, wanted, salt, step)
    if process.returncode:
        raise InputError(f"{repository}: git log ended with {process.returncode}")


def _parse(
    lines: list[str], between: str, wanted: CommitFilter, salt: str, step: Callable[[], None]
) -> Iterator[Commit]:
    parts: list[list[str]] = [[]]
    for line in lines:
        if line == between:
            parts.append([])
        else:
            parts[-1].append(line)
    if len(parts) != 6:  # output before the first commit
        return
    step()
    commit, address, seconds, subject = (part[0] for part in parts[:4])
    body = clean_body(parts[4], wanted.max_chars)
    if len(body.split()) < wanted.min_words or not subject.strip():
        return
    try:
        when = datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):  # a damaged commit has no date, or one beyond the year 9999
        return
    author = blake2b(address.lower().encode(), key=blake2b(salt.encode()).digest(), digest_size=6).hexdigest()
    subject = mask_addresses(subject.strip())
    yield Commit(f"u{author}", commit[:12], when, subject, body, prefix_of(subject), area_of(parts[5]))


def clean_body(lines: list[str], max_chars: int) -> str:
    """Return a message's body without trailers, masked and truncated to `max_chars` characters."""
    paragraphs = "\n".join(lines).strip().split("\n\n")
    while paragraphs and all(_TRAILER.match(line) for line in paragraphs[-1].strip().splitlines()):
        paragraphs.pop()
    return mask_addresses("\n\n".join(paragraphs).strip())[:max_chars].rstrip()


def prefix_of(subject: str) -> str:
    """Return what stands before a subject's first colon and space ("refs" of "refs: pack"), at most 30 characters."""
    found = _PREFIX.match(subject)
    return found[1] if found else ""


def area_of(numstat: list[str]) -> str:
    """Return the top-level folder with the most changed lines; "." for the root and for a commit without files."""
    changed: Counter[str] = Counter()
    for line in numstat:
        added, deleted, path = (line.split("\t", 2) + ["", ""])[:3]
        if path:
            folder = path.strip('"').partition("/")[0] if "/" in path else "."
            # For a binary file git prints "-" instead of line counts.
            changed[folder] += sum(int(number) for number in (added, deleted) if number.isdigit()) + 1
    return min(changed, key=lambda folder: (-changed[folder], folder)) if changed else "."


def _git(repository: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(repository), *words], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise InputError("git is not installed, or not on PATH") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"git ended with {done.returncode}"]
        raise InputError(f"{repository}: {lines[0].removeprefix('fatal: ')}")
    return done.stdout.strip()
