"""Certificate of a deletion: what was searched and found of each user, what remains, and what was not covered.

It has no content of the user's data.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from proper.interactions.byte_search import Search
from proper.interactions.file_contents import everything_below
from proper.interactions.fingerprints import Fingerprints
from proper.run_folder import PEFT_WEIGHTS, RunFolder, nested_runs

_NOT_COVERED = (
    "the file that the run was trained on (data.path) and folders that were exported",
    "backups, snapshots of file systems, and flash storage, which may keep bytes that were overwritten",
)
_REMEDY = "train again with the user's id in the file of data.train_without"


@dataclass
class Findings:
    """Results of the search so far.

    Attributes:
        found: by user, where something of the user was found.
        searched: the files, objects and tables that were searched.
        unreadable: those that could not be read, and why.
        bucket: what is said of the bucket with the run's adapters; empty without one.
        not_covered: what no search of these can cover.
    """

    found: dict[str, list[dict[str, Any]]]
    searched: list[dict[str, Any]] = field(default_factory=list)
    unreadable: list[dict[str, str]] = field(default_factory=list)
    bucket: dict[str, Any] = field(default_factory=dict)
    not_covered: list[str] = field(default_factory=lambda: [*_NOT_COVERED])

    @property
    def clean(self) -> bool:
        """Whether nothing was found, and everything could be read."""
        return not self.unreadable and not any(self.found.values())

    def add(self, entry: dict[str, Any], found: Mapping[str, list[dict[str, Any]]]) -> None:
        """Add a file that was searched, and what was found in it of each user."""
        self.searched.append(entry)
        for user, reports in found.items():
            self.found[user] += reports


def certificate(run: Path, users: Sequence[Mapping[str, Any]], findings: Findings) -> dict[str, Any]:
    """Return the certificate as JSON values; `users` are the `user_entry` of each user."""
    any_found, searched = any(findings.found.values()), findings.searched
    result = "nothing found" if findings.clean else "found" if any_found else "not all files could be read"
    return {
        **_heading(run, result),
        "users": users,
        "searched": {"files": len(searched), "bytes": sum(each["bytes"] for each in searched), "each": searched},
        **({"object_storage": findings.bucket} if findings.bucket else {}),
        "unreadable": findings.unreadable,
        "links_not_followed": [
            path.relative_to(run).as_posix() for path in everything_below(run) if os.path.islink(path)
        ],
        "remains": _remains(run),
        "not_covered": findings.not_covered,
    }


def user_entry(user: str, prints: Fingerprints, search: Search, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the certificate says of a user: how the search looked for the user, and what it found."""
    pieces = {(each.kind, each.source) for each in search.prints}
    texts, tensors = (sum(kind == wanted for kind, _ in pieces) for wanted in ("text", "tensor"))
    distinct = {
        "texts": {"given": prints.texts, "searched": texts, "below_8_bytes": prints.short},
        "tensors": {"given": prints.tensors, "searched": tensors},
    }
    values = "as a whole value; as a word in text files, unless it is a number" if search.whole_values_only else ""
    note = "texts that are not searched are short, or no different from other users' texts"
    return {"user": user, "id": values or "in every encoding", **distinct, "note": note, "found": found}


def _heading(run: Path, result: str) -> dict[str, Any]:
    return {
        "format": "proper-deletion-certificate",
        "version": 1,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "proper": version("proper-llm"),
        "run": RunFolder(run).home.path.resolve().name,
        "result": result,
    }


def _remains(run: Path) -> list[dict[str, Any]]:
    """Return the files that learnt from deleted users as from all, and why they stay."""
    found = []
    for folder in map(RunFolder, nested_runs(run)):
        for path, why in (
            (folder.population / PEFT_WEIGHTS, "stage 1 (population) learnt from all users' histories"),
            (folder.experts, "stage 2 (experts, routers, mean embedding) learnt from all users' histories"),
            (folder.poly, "the method `poly` learnt from all users' histories"),
            (folder.encoder, "the encoder of new users learnt from all users' items and embeddings"),
            (folder.users.router, "stage 3b (the LoRA-aware router) learnt from all target users' histories"),
            (folder.users.bases, "the shared bases of users' cores learnt from users' older items"),
            (folder.users.start, "the common start of users' adapters learnt from users' older items"),
            (folder.results, "aggregate figures over users that were calculated before the deletion"),
            (folder.methods_table, "aggregate figures over users that were calculated before the deletion"),
            (folder.metrics_log, "losses of training steps, each over a batch of many users"),
        ):
            if path.is_file():
                found.append({"file": path.relative_to(run).as_posix(), "why": why, "remedy": _REMEDY})
    return found
