"""Export of all users of a run in PEFT's format, with the lists that vLLM, SGLang and Ray Serve LLM read.

    proper.json           origin, rank, counts, and the measured loss of folding
    adapters/NAME/        one PEFT adapter per user: the folder of vLLM's filesystem resolver (the environment variable
                          VLLM_LORA_RESOLVER_CACHE_DIR) and, copied to object storage, Ray Serve LLM's
                          `dynamic_lora_loading_path`
    lora-modules.txt      NAME=PATH per line: arguments of `vllm serve --lora-modules` and of SGLang's `--lora-paths`
    load-requests.jsonl   {"lora_name", "lora_path"} per line: bodies of POST /v1/load_lora_adapter (vLLM) and
                          POST /load_lora_adapter (SGLang)
    users.jsonl           {"user", "lora_name", "tier", "items"} per line; without a `lora_name` the reason

NAME is the user's id where servers, shells and file systems can take it, otherwise a hash. Users are written one after
another; after an interruption, or when users have changed, the same command writes only what is missing or outdated,
and removes adapters of users who are no longer in the run.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, TextIO

from proper.adapters.records import Head
from proper.adapters.store import AdapterStore
from proper.console import progress
from proper.data.dataset import Dataset
from proper.errors import InputError
from proper.export.fold import folded_rank
from proper.export.folding_loss import folding_loss
from proper.export.peft_format import served_rank
from proper.export.run_export import require_dense, run_data, run_origin, write_peft
from proper.export.user_archive import DESCRIPTION
from proper.files import atomic_folder, atomic_path, make_folder, read_json, write_json
from proper.inference.loading import load
from proper.inference.model import PersonalizedModel

FORMAT = "proper-peft-all"
ADAPTERS = "adapters"
SAMPLE = 16
"""Users over whom the loss of folding is measured."""
MODULES, REQUESTS, USERS = "lora-modules.txt", "load-requests.jsonl", "users.jsonl"

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HASHED = re.compile(r"user-[0-9a-f]{32}")


@dataclass(frozen=True)
class AllExported:
    """Result of an export of all users.

    Attributes:
        written, kept: adapters written now, and those that were there already.
        skipped: users without a history in the run, over which the gates could be averaged.
        removed: adapters removed because their user is no longer in the run.
        rank: rank of every adapter, for `--max-lora-rank`.
        loss: the measured loss of folding; None if no user has two items of history.
    """

    written: int
    kept: int
    skipped: int
    removed: int
    rank: int
    loss: dict[str, Any] | None


def adapter_name(user: str) -> str:
    """Return the name of a user's adapter: the id itself, or `user-` and a hash where it could be misread.

    Ids are misread as options, paths, `NAME=PATH` or `MODEL:NAME` if they have other characters than letters, digits,
    `.`, `_` and `-`, and by file systems if they are long.
    """
    if _PLAIN.fullmatch(user) and not _HASHED.fullmatch(user):
        return user
    return "user-" + blake2b(user.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def export_all(folder: Path, out: Path, *, served_at: str | None, base: str | None) -> AllExported:
    """Export all users of a run in PEFT's format to the folder `out`, or complete an earlier export.

    Args:
        folder: the run folder.
        out: a new or empty folder, or an earlier export of all users.
        served_at: path or URL under which the server will find `out`; its absolute path if None.
        base: name or path of the merged backbone on the server, written as `base_model_name_or_path`, if known.

    Raises:
        InputError: `out` is something else, or the backbone is quantized.
        RunFolderError: a stage that the export needs is missing.
        StoreError: a user's adapter is damaged.
    """
    _require_own(out)
    origin = run_origin(folder)
    model = load(folder)
    with closing(model), Dataset.open(run_data(folder)) as dataset:
        require_dense(folder, model.model.backbone)
        rank = served_rank(folded_rank(model))
        make_folder(out / ADAPTERS)
        description = {"format": FORMAT, "version": 1, "origin": origin, "rank": rank, "base": base}
        write_json(out / DESCRIPTION, description | {"complete": False})
        prefix = str(out.resolve()) if served_at is None else served_at.rstrip("/")
        counts = _write_all(model, dataset, out, prefix, origin | {"base": str(base)}, base)
        loss = folding_loss(model, dataset, SAMPLE)
        result = AllExported(**counts, rank=rank, loss=loss)
        users = result.written + result.kept
        write_json(
            out / DESCRIPTION,
            description | {"complete": True, "adapters": users, "skipped": result.skipped, "loss_of_folding": loss},
        )
    return result


def _write_all(
    model: PersonalizedModel, dataset: Dataset, out: Path, prefix: str, origin: dict[str, str], base: str | None
) -> dict[str, int]:
    """Write every user's adapter and the lists; return the counts of `AllExported`."""
    assert model.store is not None
    store, counts = model.store, {"written": 0, "kept": 0, "skipped": 0, "removed": 0}
    with ExitStack() as stack:
        modules, requests, users = (_text(stack, out / name) for name in (MODULES, REQUESTS, USERS))
        advance = stack.enter_context(progress("export", sum(1 for _ in store.users())))
        for user, head in _heads(store):
            name = adapter_name(user)
            history = dataset.history(user, model.config.users.max_items)
            row = {"user": user, "tier": str(model.tier(user)), "items": len(history)}
            if not history:
                counts["skipped"] += 1
                print(json.dumps(row | {"reason": "no history in the run's data"}, ensure_ascii=False), file=users)
                advance(1)
                continue
            state = {"origin": origin, "record": {"version": head.version, "checksum": (head.checksum or b"").hex()}}
            place = out / ADAPTERS / name
            if _is_current(place, state):
                counts["kept"] += 1
            else:
                with atomic_folder(place) as new:
                    write_peft(new, model, history, user, state, base)
                counts["written"] += 1
            path = f"{prefix}/{ADAPTERS}/{name}"
            print(f"{name}={path}", file=modules)
            print(json.dumps({"lora_name": name, "lora_path": path}), file=requests)
            print(json.dumps({"lora_name": name} | row, ensure_ascii=False), file=users)
            advance(1)
        counts["removed"] = _remove_gone(out / ADAPTERS, store, dataset)
    return counts


def _heads(store: AdapterStore) -> Iterator[tuple[str, Head]]:
    for user, _ in store.users():
        head = store.head(user)
        if head is not None:  # deleted since the list was read
            yield user, head


def _is_current(place: Path, state: dict[str, Any]) -> bool:
    """Whether an adapter is there and belongs to this version of its user."""
    if not (place / DESCRIPTION).is_file():
        return False
    found = read_json(place / DESCRIPTION)
    return isinstance(found, dict) and all(found.get(key) == value for key, value in state.items())


def _remove_gone(adapters: Path, store: AdapterStore, dataset: Dataset) -> int:
    """Remove the adapters of users who are no longer in the store or have no history any more; return how many."""
    gone = []
    for place in adapters.iterdir():
        description = read_json(place / DESCRIPTION) if (place / DESCRIPTION).is_file() else {}
        user = description.get("user") if isinstance(description, dict) else None
        if not isinstance(user, str) or store.head(user) is None or not dataset.history(user, 1):
            gone.append(place)
    for place in gone:
        shutil.rmtree(place)
    return len(gone)


def _text(stack: ExitStack, path: Path) -> TextIO:
    temporary = stack.enter_context(atomic_path(path))
    return stack.enter_context(temporary.open("w", encoding="utf-8"))


def _require_own(out: Path) -> None:
    """Raise an InputError unless `out` is missing, empty or an export of all users."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    description = read_json(out / DESCRIPTION) if out.is_dir() and (out / DESCRIPTION).is_file() else None
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise InputError(f"{out}: exists already and is not an export of all users; name another folder")


def in_words(result: AllExported, out: Path) -> list[str]:
    """Return what was exported, what folding costs, and how servers read it, as lines."""
    lines = [
        f"{result.written + result.kept} adapters of rank {result.rank} ({result.written} new), "
        f"{result.skipped} users without a history left out, {result.removed} adapters removed"
    ]
    if result.loss is None:
        lines.append("loss of folding: not measured, because no user has two items of history")
    else:
        loss = result.loss
        between = "" if loss["ci95"] is None else ", 95 % from {:+.4f} to {:+.4f}".format(*loss["ci95"])
        lines.append(
            f"loss of folding, {loss['items']} held-out items of {loss['users']} users: {loss['folded']:.4f} nats per "
            f"answer token instead of {loss['exact']:.4f} (difference {loss['difference']:+.4f}{between})"
        )
    return [*lines, f"servers read {out / MODULES}, {out / REQUESTS} or {out / ADAPTERS}; see the guide 'Export'"]
