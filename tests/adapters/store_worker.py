"""What another process does with a store; run by `runpy` with `folder`, `job` and what the job needs."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

from proper.adapters.store import AdapterStore, UserRecord
from proper.errors import StoreError

SIZE = 300


def record(user: str, number: int) -> UserRecord:
    """A record of which every part follows from the user and a number."""
    generator = torch.Generator().manual_seed(number * 31 + sum(user.encode()))
    adapter = {"A": torch.randn(3, SIZE, generator=generator), "B": torch.randn(SIZE, generator=generator)}
    return UserRecord(user, "users", torch.tensor([float(number)]), adapter, {"number": number})


def verify(found: UserRecord) -> int:
    """Return the number that a record was made of, if it is one of `record`'s."""
    number = int(found.metadata["number"])
    wanted = record(found.user, number)
    assert wanted.adapter is not None and found.adapter is not None
    assert torch.equal(found.embedding, wanted.embedding), found.user
    assert all(torch.equal(found.adapter[name], wanted.adapter[name]) for name in wanted.adapter), found.user
    return number


def write(folder: Path, name: str, rounds: int) -> None:
    """Put users of one's own and one that all writers share, over and over; delete one now and then."""
    store = AdapterStore(folder, shard_bytes=1 << 15)
    for number in range(rounds):
        store.put([record(f"{name}{number % 5}", number), record("shared", number)])
        if number % 7 == 6:
            store.delete(f"{name}{number % 5}")
    store.close()


def read(folder: Path, stop: Path) -> None:
    """Read everybody until told to stop."""
    store = AdapterStore(folder)
    seen = 0
    while not stop.exists() or not seen:
        for user, _ in store.users():
            if (found := store.get(user)) is not None:
                verify(found)
                seen += 1
    store.close()


def forever(folder: Path, log: Path, file_bytes: int) -> None:
    """Put the same four users again and again, and note each commit; somebody will kill this."""
    store = AdapterStore(folder, file_bytes=file_bytes, shard_bytes=1 << 16)
    last = store.get("k0")
    number = verify(last) if last is not None else 0
    with log.open("ab", buffering=0) as file:
        while True:
            number += 1
            store.put(people(number))
            file.write(f"{number}\n".encode())


def people(number: int) -> Iterator[UserRecord]:
    for at in range(4):
        yield record(f"k{at}", number)


def full(folder: Path, said: Path, file_bytes: int) -> None:
    """Put until no file may grow any more, then go on with what still works."""
    store = AdapterStore(folder, file_bytes=file_bytes, shard_bytes=1 << 30)
    store.put(people(1))
    limit = 64 << 10 if not file_bytes else (folder / "users.sqlite").stat().st_size + (200 << 10)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    number = 1
    try:
        while number < 500:
            big = record("big", number + 1)
            assert big.adapter is not None
            bigger = {name: tensor.repeat(20, *[1] * (tensor.dim() - 1)) for name, tensor in big.adapter.items()}
            store.put([*people(number + 1), UserRecord("big", "users", big.embedding, bigger)])
            number += 1
    except StoreError as error:
        for at in range(4):
            found = store.get(f"k{at}")
            assert found is not None and verify(found) == number
        said.write_text(f"{number} {error}")
    store.close()


def main(job: str, folder: str, **more: object) -> None:
    torch.set_num_threads(1)
    paths = {key: Path(value) if isinstance(value, str) and os.sep in value else value for key, value in more.items()}
    {"write": write, "read": read, "forever": forever, "full": full}[job](Path(folder), **paths)  # type: ignore[operator]


if __name__ == "worker":
    main(**globals()["arguments"])
