"""Safe file names from arbitrary strings such as user ids."""

from __future__ import annotations

import hashlib
import re

CLEAN = re.compile(r"[a-z0-9](?:[a-z0-9_]|-(?!-)){0,39}")


def safe_name(text: str) -> str:
    """Return a file name valid on all file systems; different strings get different names, also ignoring case.

    A short string of lower-case letters, digits, `_` and single `-` is its own name. Any other string becomes its
    readable characters, `--` and a prefix of its SHA-256.
    """
    if CLEAN.fullmatch(text):
        return text
    rest = re.sub(r"[^a-z0-9_]+", "-", text.lower())[:24].strip("-") or "x"
    return f"{rest}--{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
