r"""Reader of BibTeX files: entries one by one, and the plain text of LaTeX in their fields.

Covers what machine-written bibliographies contain: fields in braces or quotes, month names, `#` between parts, accents
(`{\'e}`), formatting commands (`\textit{...}`) and simple formulas. Macros (`@string`) are not expanded.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_HEAD = re.compile(r"@\s*(\w+)\s*\{\s*([^,\s{}]*)\s*,")
_FIELD = re.compile(r"\s*,?\s*([\w-]+)\s*=\s*")
_BARE = re.compile(r"[^\s,#{}\"]+")
_JOIN = re.compile(r"\s*#\s*")
_NO_ENTRY = ("comment", "preamble", "string")

_ACCENTS = {
    "`": "\u0300", "'": "\u0301", "^": "\u0302", "~": "\u0303", "=": "\u0304", "u": "\u0306", ".": "\u0307",
    '"': "\u0308", "r": "\u030a", "H": "\u030b", "v": "\u030c", "d": "\u0323", "c": "\u0327", "k": "\u0328",
    "b": "\u0331", "textcommabelow": "\u0326",
}  # fmt: skip
_ACCENT = re.compile(
    r"\\(?:([`'^~=.\"])|([uvHckrbd]|textcommabelow)(?![A-Za-z]))\s*(?:\{\s*\\?([A-Za-z]?)\s*\}|\\([ij])(?![A-Za-z])|([A-Za-z]))"
)
_SYMBOLS = {
    "i": "ı", "j": "ȷ", "o": "ø", "O": "Ø", "l": "ł", "L": "Ł", "ss": "ß", "ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ",
    "aa": "å", "AA": "Å", "th": "þ", "TH": "Þ", "dh": "ð", "DH": "Ð", "dj": "đ", "DJ": "Đ", "ldots": "…", "dots": "…",
    "pounds": "£", "copyright": "©", "S": "§", "P": "¶", "dag": "†", "ddag": "‡", "textendash": "–", "textemdash": "—",
    "textquoteright": "’", "textquoteleft": "‘", "textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^",
    "times": "×", "div": "÷", "pm": "±", "cdot": "·", "bullet": "•", "circ": "°", "sim": "~", "approx": "≈",
    "neq": "≠", "ne": "≠", "leq": "≤", "le": "≤", "geq": "≥", "ge": "≥", "infty": "∞", "rightarrow": "→", "to": "→",
    "leftarrow": "←", "leftrightarrow": "↔", "in": "∈", "ell": "ℓ", "partial": "∂", "sum": "∑", "prod": "∏",
    "int": "∫", "surd": "√", "neg": "¬", "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε",
    "varepsilon": "ε", "eta": "η", "theta": "θ", "kappa": "κ", "lambda": "λ", "mu": "μ", "pi": "π", "rho": "ρ",
    "sigma": "σ", "tau": "τ", "phi": "φ", "chi": "χ", "psi": "ψ", "omega": "ω", "Delta": "Δ", "Phi": "Φ", "Psi": "Ψ",
    "Omega": "Ω", "Sigma": "Σ",
}  # fmt: skip
_COMMAND = re.compile(r"\\([A-Za-z]+)\s*|\\(.)", re.DOTALL)
# Commands that only format their argument; another unknown command stays as its name.
_FORMAT = re.compile(
    r"(text|math)[a-z]*|[mf]box|emph|url|href|u(nder)?line|operatorname|boldsymbol|rm|it|bf|tt|em|sc|sf|sl"
)
_HREF = re.compile(r"\\href\s*\{(?:[^{}]|\{[^{}]*\})*\}")
_QUOTES = (("---", "—"), ("--", "–"), ("``", "“"), ("''", "”"), ("{`}", "‘"), ("{'}", "’"))


@dataclass(frozen=True)
class BibEntry:
    """One entry: its type and field names in lower case, field values as written, without outer braces or quotes."""

    line: int
    kind: str
    key: str
    fields: dict[str, str]


def read_bibtex(lines: Iterable[str]) -> Iterator[tuple[int, BibEntry | str]]:
    """Yield (line, entry) for each entry, or an error text in place of one that is malformed.

    An entry begins in the first column of a line, as programs write it; a line that begins with "@" ends an entry whose
    braces are not closed. Memory holds one entry.
    """
    entry: list[str] = []
    begun = depth = 0
    for number, line in enumerate(lines, 1):
        if line.startswith("@"):
            if entry:
                yield begun, "the entry's braces are not closed"
            entry, begun, depth = [], number, 0
        elif not entry:
            continue
        entry.append(line)
        depth += line.count("{") - line.count("}")
        if depth <= 0 and "{" in "".join(entry[:1]):
            found = _parse("".join(entry), begun)
            if found is not None:
                yield begun, found
            entry = []
    if entry:
        yield begun, "the entry's braces are not closed"


def _parse(text: str, line: int) -> BibEntry | str | None:
    head = _HEAD.match(text)
    if head is None:
        kind = re.match(r"@\s*(\w*)", text)
        return None if kind and kind[1].lower() in _NO_ENTRY else "not an entry: no key after the brace"
    if head[1].lower() in _NO_ENTRY:
        return None
    at, fields = head.end(), dict[str, str]()
    while field := _FIELD.match(text, at):
        try:
            value, at = _value(text, field.end())
        except ValueError as error:
            return f"{field[1]}: {error}"
        fields[field[1].lower()] = value
    if text[at:].strip(" \t\r\n,") != "}":
        return f"not a field: {' '.join(text[at : at + 40].split())!r}"
    return BibEntry(line, head[1].lower(), head[2], fields)


def _value(text: str, at: int) -> tuple[str, int]:
    """Return a field's value and the index behind it: parts in braces, in quotes or bare, joined by `#`."""
    parts = []
    while True:
        if text[at : at + 1] in ("{", '"'):
            end = _end(text, at)
            parts.append(text[at + 1 : end - 1])
        else:
            bare = _BARE.match(text, at)
            if bare is None:
                raise ValueError("has no value")
            parts.append(bare[0])
            end = bare.end()
        join = _JOIN.match(text, end)
        if join is None:
            return "".join(parts), end
        at = join.end()


def _end(text: str, at: int) -> int:
    """Return the index behind a value in braces or quotes that begins at `at`; quotes inside of braces are text."""
    depth = 0
    for mark in re.compile(r'[{}"]').finditer(text, at + (text[at] == '"')):
        if mark[0] == '"':
            if text[at] == '"' and depth == 0:
                return mark.end()
            continue
        depth += 1 if mark[0] == "{" else -1
        if text[at] == "{" and depth == 0:
            return mark.end()
    raise ValueError("is not closed")


def split_names(text: str) -> list[str]:
    """Return the names of an `author` field, each as plain text."""
    names, depth, start = [], 0, 0
    for mark in re.finditer(r"[{}]|\s+and\s+", text):
        if mark[0] in "{}":
            depth += 1 if mark[0] == "{" else -1
        elif depth == 0:
            names.append(text[start : mark.start()])
            start = mark.end()
    return [name for name in map(plain_text, [*names, text[start:]]) if name]


def plain_text(latex: str) -> str:
    r"""Return LaTeX as plain text: accents and symbols as characters, commands replaced by their arguments.

    "{\'E}tude of \textit{LM}s" is "Étude of LMs".
    """
    text = _HREF.sub("", latex)
    text = _ACCENT.sub(_accented, text)
    for written, meant in _QUOTES:
        text = text.replace(written, meant)
    text = text.replace("~", " ")
    text = _COMMAND.sub(_character, text)
    text = re.sub(r"[{}$]", "", text).translate(_HIDDEN)
    return " ".join(text.split())


# Escaped braces and dollars must survive the removal of the others, so they pass through as private characters.
_HIDDEN = str.maketrans({"\ue000": "{", "\ue001": "}", "\ue002": "$", "\ue003": "~"})
_SHOWN = {"{": "\ue000", "}": "\ue001", "$": "\ue002", "~": "\ue003"}


def _accented(found: re.Match[str]) -> str:
    letter = found[3] or found[4] or found[5] or ""
    return unicodedata.normalize("NFC", letter + _ACCENTS[found[1] or found[2]]) if letter else ""


def _character(found: re.Match[str]) -> str:
    if found[1]:
        symbol = _SYMBOLS.get(found[1])
        if symbol is None:
            return "" if _FORMAT.fullmatch(found[1]) else found[1]
        return _SHOWN.get(symbol, symbol)
    if found[2] in "&%#_ ":
        return found[2]
    return _SHOWN.get(found[2], " " if found[2] in "\\/,;:\n" else "")
