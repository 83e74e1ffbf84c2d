"""Verification of a deletion: a search of every file of a run folder for a user, and a certificate of the result.

If the adapters of a run are in a bucket, every version of every object is searched as well.

The search is independent of the deletion: it reads every existing file, in the registry or not, as `file_contents`
yields it, and searches for the user's id, texts and tensors (`byte_search`). Pieces of text that other users' texts
contain too are left out, since they do not identify the user.

A process that has one of the run's databases open must not search: closing a file drops its locks (`unused_space`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from proper.adapters.storage_setting import setting_of
from proper.adapters.store import DEFAULT_TENANT, AdapterStore
from proper.databases.location import Location, is_made, location_of
from proper.errors import StoreError
from proper.files import hash_file
from proper.interactions.byte_search import Hit, Search
from proper.interactions.certificate import Findings, certificate, user_entry
from proper.interactions.file_contents import UNREADABLE, contents, files_below, is_gone
from proper.interactions.fingerprints import Fingerprints, stored_forms
from proper.interactions.log import InteractionLog
from proper.interactions.other_users import other_ids, texts_of_others
from proper.interactions.personal_files import work_folder
from proper.interactions.user_rows import logged_rows, run_rows
from proper.run_folder import RunFolder, kind_of, nested_runs

MAX_OFFSETS = 5
"""Byte offsets that the certificate names per file and kind."""


_NOT_ROWS = (
    "files of the PostgreSQL server: rows were searched by query, but free space in pages, the write-ahead log, "
    "replicas and logs of the server may keep deleted rows until they are overwritten"
)
_NOT_IN_BUCKET = (
    "copies of the bucket elsewhere, such as replicas and backups of the provider",
    "caches in copies of the run folder on other machines: a server there wipes its own within a minute, and "
    "'proper users check' at once",
    "unfinished uploads, if the server lists them only for an object's whole name, as MinIO does; it removes them "
    "itself, after a day by default",
)


@dataclass(frozen=True)
class Verified:
    """The certificate as JSON values, and whether it is clean: nothing found, and everything could be read."""

    certificate: dict[str, Any]
    clean: bool


def fingerprint(store: AdapterStore, log: InteractionLog, user: str, salt: bytes) -> Fingerprints:
    """Return the prints of everything a run has of a user: texts of the run's data and of the log, and all tensors."""
    run, prints = RunFolder(store.folder.parent).home.path, Fingerprints(salt)
    rows = list(run_rows(run, user)) if store.tenant == DEFAULT_TENANT else []
    rows += logged_rows(log, store.tenant, user)
    texts = (row.get(key) for key in ("prompt", "target", "item") for row in rows)
    prints.add_texts(text for text in texts if isinstance(text, str))
    for folder in nested_runs(run):
        users = RunFolder(folder).users
        if is_made(users.manifest):
            with closing(AdapterStore(users.path, store.tenant)) as nested:
                for version in nested.versions(user):
                    record = nested.get(user, version.version)
                    if record is not None:
                        prints.add_tensors({"embedding": record.embedding})
                        prints.add_tensors(stored_forms(record.adapter or {}))
    return prints


def verify(
    run: Path, wanted: Sequence[tuple[str, Fingerprints]], advance: Callable[[int], None] = lambda count: None
) -> Verified:
    """Search a run folder for users of the default tenant and return the certificate.

    Args:
        run: the run folder.
        wanted: each user and their prints; all with one salt.
        advance: called with the number of files that were searched since the last call.
    """
    home = RunFolder(run).home
    searches = _searches(home, wanted)
    findings = Findings({user: _still_known(home, user) for user in searches})
    _search_files(run, searches, findings, advance)
    location = location_of(home.users.path)
    if location is not None:
        _search_rows(location, searches, findings)
    _search_bucket(home.path, searches, findings)
    users = [user_entry(user, prints, searches[user], findings.found[user]) for user, prints in wanted]
    return Verified(certificate(run, users, findings), findings.clean)


def _searches(home: RunFolder, wanted: Sequence[tuple[str, Fingerprints]]) -> dict[str, Search]:
    """Return the search for each user, without pieces of text that other users have too."""
    searches, names = {}, {user for user, _ in wanted}
    for user, prints in wanted:
        search = Search(user, other_ids(home, names), prints.prints, prints.salt)
        search.drop(search.shared(texts_of_others(home, names)))
        searches[user] = search
    return searches


def _search_files(run: Path, searches: dict[str, Search], findings: Findings, advance: Callable[[int], None]) -> None:
    """Search every file of the run folder; those that a server or a fit removes meanwhile are left out."""

    def unread(path: Path, error: BaseException) -> None:
        if not is_gone(path):
            why = f"{type(error).__name__}: {error}"
            findings.unreadable.append({"file": path.relative_to(run).as_posix(), "why": why})

    for path in files_below(run, unread):
        try:
            findings.add(*_search_file(path, path.relative_to(run).as_posix(), searches))
        except UNREADABLE as error:
            unread(path, error)
        advance(1)


def _search_file(
    path: Path, name: str, searches: dict[str, Search]
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Search one file for all users; return how it was read, and the findings of each user."""
    ways, found = list[str](), dict[str, list[dict[str, Any]]]()
    for user, search in searches.items():
        reports = _reports(name, "", "file name", search.scan([name.encode("utf-8", "surrogateescape")]))
        for content in contents(path):
            if content.how not in ways:
                ways.append(content.how)
            joined = content.how == "raw" and _is_of_sqlite(path)
            reports += _reports(name, content.inside, content.how, search.scan(content.pieces, joined=joined))
        found[user] = reports
    kind = kind_of(Path(name)) or "not of a run"
    entry = {"file": name, "kind": kind, "bytes": path.stat().st_size, "sha256": hash_file(path), "read_as": ways}
    return entry, found


def _search_rows(location: Location, searches: dict[str, Search], findings: Findings) -> None:
    """Search all rows of a run's tables in PostgreSQL as `_search_file` searches a file."""
    from proper.databases.postgresql.database import cells

    name, found, digest, size = str(location), dict[str, list[dict[str, Any]]](), sha256(), 0
    for some in cells(location):
        digest.update(some)
        size += len(some)
    for user, search in searches.items():
        found[user] = _reports(name, "", "rows", search.scan(cells(location)))
    entry = {"file": name, "kind": "store", "bytes": size, "sha256": digest.hexdigest(), "read_as": ["rows"]}
    findings.add(entry, found)
    findings.not_covered.append(_NOT_ROWS)


def _search_bucket(run: Path, searches: dict[str, Search], findings: Findings) -> None:
    """Search every version of every object of a run whose adapters are in a bucket, those of nested runs included."""
    setting = setting_of(run)
    if setting is None:
        return
    findings.not_covered += _NOT_IN_BUCKET
    bucket = findings.bucket
    bucket["url"] = setting.bucket.url
    try:
        bucket |= {"versioned": setting.bucket.is_versioned, "versions": 0, "delete_markers": 0}
        for each in setting.bucket.versions():
            bucket["delete_markers" if each.is_marker else "versions"] += 1
            name = setting.bucket.url + each.key + ("" if each.id == "null" else f"?versionId={each.id}")
            data = b"" if each.is_marker else b"".join(setting.bucket.pieces(each))
            found = dict[str, list[dict[str, Any]]]()
            for user, search in searches.items():
                reports = _reports(name, "", "object name", search.scan([each.key.encode()]))
                found[user] = [*reports, *_reports(name, "", "raw", search.scan([data]))]
            digest = sha256(data).hexdigest()
            entry = {"file": name, "kind": "object", "bytes": len(data), "sha256": digest, "read_as": ["raw"]}
            findings.add(entry, found)
        uploads = [f"{setting.bucket.url}{each.key}" for each in setting.bucket.uploads()]
        bucket["unfinished_uploads"] = len(uploads)
        findings.unreadable += [{"file": each, "why": "an unfinished upload cannot be read"} for each in uploads]
    except StoreError as error:
        findings.unreadable.append({"file": setting.bucket.url, "why": str(error)})


def _is_of_sqlite(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(16)
    return head.startswith((b"SQLite format 3\0", b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83")) or "sqlite" in path.name


def _reports(name: str, inside: str, how: str, hits: Iterable[Hit]) -> list[dict[str, Any]]:
    """Return one finding per kind of what was found in a stream, without content."""
    hits, reports = sorted(hits), []
    for kind in dict.fromkeys(hit.kind for hit in hits):
        places = sorted({hit.at for hit in hits if hit.kind == kind})
        sources = len({hit.source for hit in hits if hit.kind == kind})
        where = {"file": name, **({"inside": inside} if inside else {}), "read_as": how}
        reports.append({**where, "kind": kind, "different": sources, "times": len(places), "at": places[:MAX_OFFSETS]})
    return reports


def _still_known(run: RunFolder, user: str) -> list[dict[str, Any]]:
    """Return findings for a user whom a store, the log or a fit still has, or whose deletion is not finished."""
    found = []
    for folder in nested_runs(run.path):
        users = RunFolder(folder).users
        name = users.path.relative_to(run.path).as_posix()
        if is_made(users.manifest):
            with closing(AdapterStore(users.path)) as store:
                if store.head(user) is not None:
                    found.append({"file": f"{name}/{users.manifest.name}", "kind": "id", "read_as": "store"})
        if is_made(users.log):
            with closing(InteractionLog(users.path)) as log:
                if log.knows(DEFAULT_TENANT, user):
                    found.append({"file": f"{name}/{users.log.name}", "kind": "id", "read_as": "log"})
                if log.deletions.of(DEFAULT_TENANT, user) is not None:
                    found.append({"file": f"{name}/{users.log.name}", "kind": "unfinished deletion", "read_as": "log"})
        if (fit := work_folder(users.path, DEFAULT_TENANT, user)).exists():
            found.append(
                {"file": fit.relative_to(run.path).as_posix(), "kind": "unfinished fit", "read_as": "file name"}
            )
    return found
