"""Archive of all data of one user in a run: one zip file that can be read without `proper`.

    README.txt                       description of the files
    interactions.jsonl               all interactions: of the run's data (queries included) and logged, with texts
    log.json                         the interaction log's other rows about the user: the latest fit, attempts to update
    versions.json                    every stored version, with its metadata
    version-N.safetensors            its embedding (D,) and, with an adapter, the matrices A and B by module
    files/PATH.json                  the user's data in the personal file PATH of the run folder
    fits/NAME                        state of an unfinished fit
    seeds/N/..., variants/NAME/...   the same of further seeds and derived runs

Every kind of file in `personal_files.PERSONAL_FILES` is read. What all users share (population, groups, routers) is not
in it.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from safetensors.torch import save

from proper.adapters.store import DEFAULT_TENANT, AdapterStore
from proper.databases.location import is_made
from proper.errors import InputError, ProperError
from proper.interactions.log import InteractionLog
from proper.interactions.personal_files import files_of, work_folder
from proper.interactions.user_rows import logged_rows, run_rows
from proper.run_folder import RunFolder, nested_runs

TEXTS = "interactions.jsonl"
"""The file with all interactions."""

README = """\
Everything that the run "{run}" holds of user {user}
Written {date} by proper, https://pypi.org/project/proper-llm

No program of proper is needed to read it: .json is JSON, .jsonl one JSON object a line (UTF-8), and .safetensors the
format of the Python package "safetensors" (load_file returns tensors by name). Times are seconds since 1970, UTC.

{texts}   Your interactions. "source" is "run" for the data the run was made with ("part" says how it was
                     used: "history" to train on, "query" to test with, "unused" neither) or "log" for what was sent
                     to the server or added later ("received" is when). "prompt" and "target" are the texts.
log.json             The state of the latest fit of your data, and what came of attempts to update your model.
versions.json        Every stored version of your personal model, newest first; the first is in use. "tier" is "users"
                     with an adapter of your own, or "groups" with an embedding only; "facts" says how it was made.
version-N.safetensors   The numbers of version N: "embedding", and the adapter's matrices A and B by module.
files/               For each file of the run that mentions you, what it says of you: predictions for your queries
                     with the answers, scores, the groups that answered you, pages of reports.
fits/                The state of a fit that is not finished, if there is one.
seeds/, variants/    The same again for repeated trainings and for other methods that were compared.

Not here: the parts of the model that all users share, which learnt from your data too; no part of them is yours alone.
{quarantine}
Contents:
{contents}
"""


def write_archive(target: IO[bytes], store: AdapterStore, log: InteractionLog, user: str) -> None:
    """Write the archive of a user of the store's tenant as a zip file.

    Args:
        target: a binary file that is open for writing and can seek.
        store: the run's adapter store.
        log: the run's interaction log.
        user: the user.

    Raises:
        InputError: the run does not know the user, or is deleting them, or has begun to while the archive was written.
        StoreError: a file of the run is damaged; names it.
    """
    _require_there(store, log, user)
    run = RunFolder(store.folder.parent).home.path
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        names = list[str]()
        for name, content in _contents(run, store, log, user):
            archive.writestr(name, content)
            names.append(name)
        held = RunFolder(run).users.quarantine.is_dir()
        note = (
            "Data that a repair of the store set aside cannot be attributed to users and is not here.\n" if held else ""
        )
        contents = "\n".join(f"  {name}" for name in names) or "  nothing"
        date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        text = README.format(texts=TEXTS, run=run.name, user=user, date=date, quarantine=note, contents=contents)
        archive.writestr("README.txt", text.encode("utf-8", "backslashreplace"))
    _require_there(store, log, user)  # else only a part was there to be read


def _require_there(store: AdapterStore, log: InteractionLog, user: str) -> None:
    if log.deletions.of(store.tenant, user) is not None:
        raise InputError(f"{store.folder}: user {user!r} is being deleted")
    if store.head(user) is None and not log.knows(store.tenant, user):
        raise InputError(f"{store.folder}: there is no user {user!r}")


def _contents(run: Path, store: AdapterStore, log: InteractionLog, user: str) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of every file but the README."""
    tenant = store.tenant
    own = list(run_rows(run, user)) if tenant == DEFAULT_TENANT else []
    yield TEXTS, b"".join(map(_line, [*own, *logged_rows(log, tenant, user)]))
    updates = [attempt.as_json() for attempt in log.updates.of(tenant, user)]
    yield "log.json", _json({"fit": asdict(log.queue.fit(tenant, user)), "updates": updates})
    yield from _stored(store, user, "")
    yield from _fits(store.folder, tenant, user, "")
    for folder in nested_runs(run):
        users = RunFolder(folder).users
        if users.path != store.folder and is_made(users.manifest):
            prefix = f"{folder.relative_to(run).as_posix()}/" if folder != run else "users/"
            with closing(AdapterStore(users.path, tenant)) as nested:
                yield from _stored(nested, user, prefix)
            if is_made(users.log):
                with closing(InteractionLog(users.path)) as nested_log:
                    rows = b"".join(map(_line, logged_rows(nested_log, tenant, user)))
                    if rows:
                        yield f"{prefix}{TEXTS}", rows
            yield from _fits(users.path, tenant, user, prefix)
    if tenant == DEFAULT_TENANT:
        for kind, path in files_of(run):
            try:
                found = kind.extract(path, user)
            except (OSError, ProperError):
                if path.exists():
                    raise
                continue  # removed since it was listed, as a report is when another user is deleted
            if found:
                name = f"files/{path.relative_to(run).as_posix()}.json"
                yield name, _json({"file": path.relative_to(run).as_posix(), "kind": kind.holds, "found": found})


def _stored(store: AdapterStore, user: str, prefix: str) -> Iterator[tuple[str, bytes]]:
    """Yield all versions of a user: their metadata, and the tensors of each."""
    versions = store.versions(user)
    if versions:
        yield f"{prefix}versions.json", _json([each.as_json() for each in versions])
    for each in versions:
        record = store.get(user, each.version)
        if record is not None:
            tensors = {"embedding": record.embedding, **(record.adapter or {})}
            yield f"{prefix}version-{each.version}.safetensors", save({k: t.contiguous() for k, t in tensors.items()})


def _fits(users: Path, tenant: str, user: str, prefix: str) -> Iterator[tuple[str, bytes]]:
    folder = work_folder(users, tenant, user)
    for path in sorted(Path(parent, name) for parent, _, names in os.walk(folder) for name in names):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue  # the fit goes on, or has ended
        yield f"{prefix}fits/{path.relative_to(folder).as_posix()}", content


def _line(value: Any) -> bytes:
    return json.dumps(_finite(value), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _json(value: Any) -> bytes:
    return json.dumps(_finite(value), ensure_ascii=False, indent=2).encode("utf-8", "backslashreplace") + b"\n"


def _finite(value: Any) -> Any:
    """Return a JSON value with null for NaN and infinities, which JSON does not have."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)
