"""Numbers, intervals, sizes, durations and names for display, and file names for user ids."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from statistics import fmean

NO_BREAK = "\u00a0"  # non-breaking space
CLEAN = re.compile(r"[a-z0-9](?:[a-z0-9_]|-(?!-)){0,39}")
METHODS = {
    "base": "Backbone",
    "population": "Population",
    "groups": "Groups",
    "users": "Users",
    "end-to-end": "End to end",
    "end-to-end-steps": "End to end, equal steps",
    "oppu": "OPPU",
    "poly": "Poly (PEFT)",
    "rag": "RAG",
    "pag": "PAG",
    "groups-no-constraint": "Groups, no constraint",
    "users-no-router": "Users, no LoRA-aware router",
    "static-export": "Static export",
    "users-int8": "Users, int8 adapters",
    "population-more": "Population, more training",
    "groups-shared-e": "Groups, one shared embedding",
    "swapped": "Another user's adapter (swapped)",
    "shuffled": "Shuffled user ids (control)",
    "user-majority": "User's majority answer",
    "user-majority-same": "User's majority answer, same items",
    "prior": "User prior",
    "lead": "First words of the input",
    "users+prior": "Users and prior",
    "groups+prior": "Groups and prior",
    "users+residual": "Users, residual to the prior",
    "groups+residual": "Groups, residual to the prior",
    "head+prior": "Linear head and prior",
    "users+head": "Users and linear head",
    "groups+head": "Groups and linear head",
    "global-majority": "Global majority answer",
    "constraint-experts": "Groups, constraint on experts",
    "released": "Released preset",
    "users-residual": "Users, residual router",
    "users-paper": "Users, the paper's router",
    "per-user-only": "User adapters only",
    "oppu-released": "OPPU as released",
    "rag-1": "RAG, 1 item",
    "rag-2": "RAG, 2 items",
    "rag-4": "RAG, 4 items",
    "users+rag": "Users and RAG",
}
METRICS = {
    "accuracy": "accuracy",
    "f1_macro": "macro F1",
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "rouge1": "ROUGE-1",
    "rougeL": "ROUGE-L",
    "style_prefix": "style: same prefix",
    "style_case": "style: same first case",
    "style_length": "style: length ratio",
    "style_punctuation": "style: same final mark",
    "style_match": "style: mean match",
    "style_distance": "style: distance from own history",
    "style_length_gap": "style: words from own mean",
    "loss": "answer loss",
    "label_loss": "label loss",
}


def method_name(method: str) -> str:
    """Return a method's display name."""
    return METHODS.get(method, method)


def of_task(task: str, text: str) -> str:
    """Return a text about one of several tasks; without a name, the text itself."""
    return f"{task}: {text}" if task else text


def metric_name(metric: str) -> str:
    """Return a metric's display name."""
    return METRICS.get(metric, metric)


def plain(value: float | None, digits: int = 3) -> str:
    """Return a number with `digits` decimals, fewer for large numbers, or a dash for None."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    decimals = digits if size < 10 else max(0, digits - 2) if size < 1000 else 0
    text = f"{value:,.{decimals}f}"
    return text.replace("-", "") if float(text.replace(",", "")) == 0 else text.replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """Return a number with its sign always shown."""
    text = plain(value, digits)
    return f"+{text}" if value is not None and value > 0 else text


def percent(share: float | None, digits: int = 1, sign: bool = False) -> str:
    """Return a share as a percentage."""
    if share is None:
        return "–"
    text = f"{abs(share) * 100:.{digits}f}"
    if float(text) == 0:
        return f"{text}{NO_BREAK}%"
    return f"{'−' if share < 0 else '+' if sign else ''}{text}{NO_BREAK}%"


def p_text(p: float | None) -> str:
    """Return a p-value in the usual form: `p = .012`, `p < .001`."""
    if p is None:
        return "p not available"
    text = "p < .001" if p < 0.001 else "p = 1" if p >= 0.9995 else f"p = {p:.3f}".replace("0.", ".")
    return text.replace(" ", NO_BREAK)


def span(pair: tuple[float, float] | None, sign: bool = False) -> str:
    """Return an interval as `[low, high]`."""
    show = signed if sign else plain
    return "–" if pair is None else f"[{show(pair[0])}, {show(pair[1])}]"


def size(amount: float | None) -> str:
    """Return bytes in the largest suitable unit (powers of 1000)."""
    if amount is None:
        return "–"
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"


def duration(seconds: float | None) -> str:
    """Return seconds as a human-readable duration."""
    if seconds is None:
        return "–"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return (
        f"{seconds:.3g} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def plural(amount: int, noun: str) -> str:
    """Return `1 user`, `2 users`, `2 queries`."""
    many = noun[:-1] + "ies" if noun.endswith("ry") else noun + "s"
    return f"{amount:,} {noun if amount == 1 else many}"


def listed(parts: Sequence[str]) -> str:
    """Return `a`, `a and b`, or `a, b, and c`."""
    if len(parts) < 3:
        return " and ".join(parts)
    return f"{', '.join(parts[:-1])}, and {parts[-1]}"


def mean_text(values: Sequence[float]) -> str:
    """Return the mean with its sign, or a dash for no values."""
    return signed(fmean(values)) if values else "–"


def safe_name(text: str) -> str:
    """Return a file name valid on all file systems; different strings get different names, also ignoring case.

    A short string of lower-case letters, digits, `_` and single `-` is its own name. Any other string becomes its
    readable characters, `--` and a prefix of its SHA-256.
    """
    if CLEAN.fullmatch(text):
        return text
    rest = re.sub(r"[^a-z0-9_]+", "-", text.lower())[:24].strip("-") or "x"
    return f"{rest}--{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
