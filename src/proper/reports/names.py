"""File names made of any string, such as a user's id. Knows nothing about what the files hold."""

from __future__ import annotations

import hashlib
import re

CLEAN = re.compile(r"[a-z0-9](?:[a-z0-9_]|-(?!-)){0,39}")


def safe_name(text: str) -> str:
    """Return a name for any file system; different strings get different ones, also where case does not count.

    A short string of lower-case letters, digits, `_` and single `-` is its own name. Any other is a readable rest of
    it, `--` and the beginning of its SHA-256.
    """
    if CLEAN.fullmatch(text):
        return text
    rest = re.sub(r"[^a-z0-9_]+", "-", text.lower())[:24].strip("-") or "x"
    return f"{rest}--{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
