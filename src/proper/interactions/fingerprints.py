"""Fingerprints of a user's texts and tensors: hashes of short pieces, so that a search needs no copy of them.

A print is a piece of at most `PIECE` bytes as it would lie in a file: its length, 24 bits of a hash of its first
`WINDOW` bytes, and a salted hash of the whole. A search computes the 24 bits at every offset of a file, which is fast,
and confirms the few candidates by the whole hash. A text gives several pieces of letters, digits and plain punctuation,
which JSON and HTML do not escape, in several encodings; a tensor gives pieces of its bytes in every storage form.

No content can be read from a print, but guessed content can be tested against a file of fingerprints.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, uint8

from proper.adapters.quantization import Storage, encode
from proper.errors import InputError
from proper.files import read_json, write_json
from proper.json_records import first_problem

PIECE, WINDOW = 32, 8
MAX_PRINT_BYTES = 256
"""Most bytes of a print, which in an encoding is longer than the piece."""
_MIN_PIECE = 12
_PIECES, _ENCODED = 6, 2
_TENSOR_STEP, _TENSOR_PIECES = 4096, 64
_PLAIN = re.compile(r"[A-Za-z0-9 ,.;:!?()-]+")
_FORMAT, _VERSION = "proper-fingerprints", 1

Kind = Literal["text", "tensor"]


class Print(NamedTuple):
    """The print of a piece: which text or tensor (`source`) and which piece of it, and the hashes."""

    kind: Kind
    source: int
    piece: int
    head: int
    length: int
    digest: str


@dataclass
class Fingerprints:
    """The prints of one user.

    Attributes:
        salt: key of the hashes; prints of several users with one salt are searched for together.
        texts: number of texts that were given.
        short: number of texts below `WINDOW` bytes, which are not searched for.
        tensors: number of tensors that were given.
    """

    salt: bytes
    texts: int = 0
    short: int = 0
    tensors: int = 0
    prints: list[Print] = field(default_factory=list)

    def add_texts(self, texts: Iterable[str]) -> None:
        """Add prints of texts; equal texts count once."""
        for text in dict.fromkeys(texts):
            self.texts += 1
            pieces = _pieces(text)
            self.short += not pieces
            for piece, (form, content) in enumerate(pieces):
                encoded = _encodings(content) if piece < _ENCODED else ()
                for each in dict.fromkeys((form, *encoded)):
                    self._add("text", self.texts, piece, each)

    def add_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Add prints of tensors as their bytes are stored."""
        for tensor in tensors.values():
            self.tensors += 1
            data = tensor.detach().cpu().contiguous().reshape(-1).view(uint8).numpy().tobytes()
            starts = range(0, max(1, len(data) - PIECE + 1), PIECE if len(data) < _TENSOR_STEP else _TENSOR_STEP)
            for piece, at in enumerate(starts[:_TENSOR_PIECES]):
                content = data[at : at + PIECE]
                if len(set(content)) > WINDOW:  # zeros and other constants are everywhere
                    self._add("tensor", self.tensors, piece, content)

    def _add(self, kind: Kind, source: int, piece: int, content: bytes) -> None:
        content = content[:MAX_PRINT_BYTES]
        if len(content) >= WINDOW:
            head = int(heads(np.frombuffer(content[:WINDOW], "<u8"), self.salt)[0])
            self.prints.append(Print(kind, source, piece, head, len(content), digest(content, self.salt)))


def heads(windows: NDArray[np.uint64], salt: bytes) -> NDArray[np.uint64]:
    """Return 24 bits of a salted hash of each window of 8 bytes (n,); too few to compute the window from."""
    first, second = (int.from_bytes(salt[at : at + 8], "little") | 1 for at in (0, 8))
    mixed = (windows ^ (windows >> np.uint64(32))) * np.uint64(first)
    return np.asarray(((mixed ^ (mixed >> np.uint64(29))) * np.uint64(second)) >> np.uint64(40))


def digest(content: bytes, salt: bytes) -> str:
    """Return the salted hash of a whole piece, as hex."""
    return blake2b(content, key=salt, digest_size=16).hexdigest()


def _pieces(text: str) -> list[tuple[bytes, str]]:
    """Return pieces of a text, as bytes and as text, spread evenly over it; none if the text is too short."""
    least = min(_MIN_PIECE, len(text))
    runs = [found[0] for found in _PLAIN.finditer(text)]
    cut = [run[at : at + PIECE].strip() for run in runs for at in range(0, len(run), PIECE)]
    plain = [piece for piece in cut if len(piece) >= max(WINDOW, least)]
    if plain:
        step = max(1, -(-len(plain) // _PIECES))
        return [(piece.encode(), piece) for piece in plain[::step]]
    # Other scripts: whole characters, as they are in UTF-8.
    head = text.encode("utf-8", "surrogatepass")[:PIECE].decode("utf-8", "ignore")
    return [(head.encode(), head)] if len(head.encode()) >= WINDOW else []


def _encodings(piece: str) -> Iterator[bytes]:
    """Yield a piece in UTF-16, JSON, hexadecimal and base64 (at each offset from the preceding bytes)."""
    plain = piece.encode()
    yield piece.encode("utf-16-le")
    yield json.dumps(piece)[1:-1].encode()
    yield plain.hex().encode()
    for before in range(3):
        yield base64.b64encode(bytes(before) + plain)[(0, 2, 3)[before] : (before + len(plain)) * 8 // 6]


def new_salt() -> bytes:
    """Return a new random salt."""
    return secrets.token_bytes(32)


def stored_forms(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter in all storage forms, since a file may have it in any."""
    forms = {form: encode(adapter, form) for form in get_args(Storage)}
    return {f"{form} {name}": tensor for form, coded in forms.items() for name, tensor in coded.items()}


def add_originals(prints: Fingerprints, path: Path, users: Sequence[str]) -> None:
    """Add prints of a user's own texts and tensors, as a user archive, JSONL rows or safetensors.

    Every text of a row counts; rows that name another user than `users` are skipped.

    Raises:
        InputError: the file cannot be read; names it.
    """
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    _add_file(prints, name, archive.read(name), users)
        else:
            _add_file(prints, path.name, path.read_bytes(), users)
    # zipfile raises RuntimeError for a password and for a method of compression that it does not know.
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as originals: {error}") from error


def _add_file(prints: Fingerprints, name: str, content: bytes, users: Sequence[str]) -> None:
    if name.endswith(".safetensors"):
        tensors = load(content)
        embedding = {key: tensors.pop(key) for key in ("embedding",) if key in tensors}
        prints.add_tensors(embedding)
        prints.add_tensors(stored_forms(tensors))
    elif name.endswith(".jsonl"):
        rows = [json.loads(line) for line in content.decode("utf-8").splitlines() if line.strip()]
        prints.add_texts(text for row in rows if _is_theirs(row, users) for text in _texts(row))


def _is_theirs(row: Any, users: Sequence[str]) -> bool:
    named = [row[key] for key in ("user", "user_id") if key in row] if isinstance(row, dict) else []
    return all(str(name) in users for name in named)


def _texts(value: Any, key: str = "") -> Iterator[str]:
    """Yield all texts of a row, without its keys and the fields that archives add."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _texts(each, name)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each, key)
    elif isinstance(value, str) and key not in ("user", "user_id", "source", "part", "role", "timestamp", "time"):
        yield value


def write_fingerprints(path: Path, found: Mapping[str, Fingerprints], salt: bytes) -> None:
    """Write the prints of users to a JSON file; users already in it keep theirs as well. It names no user.

    Raises:
        InputError: the file is there with another salt, or no file of fingerprints.
    """
    content = _read(path) if path.exists() else {"users": {}}
    users: dict[str, Any] = content["users"]
    for user, prints in found.items():
        key = digest(user.encode("utf-8", "surrogatepass"), salt)
        before = _entry(path, content, key) or _Entry([])
        first = 1 + max((each.source for each in before.prints), default=0)
        known = {each.digest for each in before.prints}
        new = [each._replace(source=first + each.source) for each in prints.prints if each.digest not in known]
        counts = {name: max(getattr(prints, name), getattr(before, name)) for name in ("texts", "short", "tensors")}
        users[key] = {**counts, "prints": [*map(list, before.prints), *map(list, new)]}
    write_json(path, {"format": _FORMAT, "version": _VERSION, "salt": salt.hex(), "users": users})


def salt_of(path: Path) -> bytes:
    """Return the salt of a file of fingerprints, or a new one if there is no file."""
    return bytes.fromhex(_read(path)["salt"]) if path.exists() else new_salt()


def read_fingerprints(path: Path, user: str) -> Fingerprints:
    """Return the prints of a user.

    Raises:
        InputError: the file is no file of fingerprints, is damaged, or does not have the user.
    """
    content = _read(path)
    salt = bytes.fromhex(content["salt"])
    entry = _entry(path, content, digest(user.encode("utf-8", "surrogatepass"), salt))
    if entry is None:
        raise InputError(f"{path}: has no fingerprints of user {user!r}")
    return Fingerprints(salt, entry.texts, entry.short, entry.tensors, entry.prints)


@dataclass(frozen=True)
class _Entry:
    """What a file holds of one user."""

    prints: list[Print]
    texts: int = 0
    short: int = 0
    tensors: int = 0


_ENTRY = TypeAdapter(_Entry)


def _entry(path: Path, content: Mapping[str, Any], key: str) -> _Entry | None:
    if key not in content["users"]:
        return None
    try:
        return _ENTRY.validate_python(content["users"][key])
    except ValidationError as error:
        raise InputError(f"{path}: users: {key}: {first_problem(error)}; restore a copy of it") from error


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    content = read_json(path)
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (_FORMAT, _VERSION):
        raise InputError(f"{path}: is no file of fingerprints of this version of proper")
    if not isinstance(content.get("salt"), str) or not re.fullmatch("(?:[0-9a-f]{2})+", content["salt"]):
        raise InputError(f"{path}: key 'salt' is damaged; restore a copy of it")
    if not isinstance(content.get("users"), dict):
        raise InputError(f"{path}: key 'users' is damaged; restore a copy of it")
    return content
