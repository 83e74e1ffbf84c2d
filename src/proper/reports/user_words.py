"""Text form of a user's summary (`user_summary`), one line per fact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from proper.reports.formats import metric_name, plural, size
from proper.reports.user_summary import RESTORED, decimal

TIERS = {
    "none": "none (the mean embedding of all users)",
    "groups": "groups (own embedding, no adapter)",
    "users": "users (own embedding and adapter)",
}
MAKERS = {"rollback": "a rollback", "repair": "a repair", "import": "an import", "update": "an update"}


def user_words(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that tell a summary."""
    version = "no version yet" if summary["version"] is None else f"version {summary['version']}"
    yield f"user {_shown(summary['user'])}: tier {TIERS[summary['tier']]}, {version}, {size(summary['bytes'])}"
    held = summary["interactions"]
    parts = [plural(held["history"], "history item"), plural(held["query"], "query")]
    unused = f", {plural(held['unused'], 'row')} unused" if held["unused"] else ""
    yield f"interactions: {', '.join(parts)}{unused} in the run's data; {held['logged']:,} logged"
    if summary["fit"] is not None:
        message = f": {summary['fit']['message']}" if summary["fit"]["message"] else ""
        yield f"latest fit: {summary['fit']['state']}{message}"
    gates = summary["gates"]
    unmeasured = "not measured ('proper evaluate' measures the users of the run's data)"
    yield f"groups, by the mean gate: {gates['words'] if gates else unmeasured}"
    yield from _gain(summary["gain"])
    yield "versions, newest first:" if summary["versions"] else "versions: none"
    for at, each in enumerate(summary["versions"]):
        yield from _version(each, "current" if at == 0 else "earlier")
    for row in summary.get("texts", ()):
        yield f"{row['source']} {row.get('row', row.get('id'))}: {row['prompt']!r} -> {row['target']!r}"


def _gain(gain: Mapping[str, Any]) -> Iterator[str]:
    held, asked = gain["held_out"], gain["queries"]
    if held is not None:
        items = "held-out items" if held["held_out"] is None else plural(held["held_out"], "held-out item")
        change = f"{decimal(held['group'])} with groups, {decimal(held['user'])} with the adapter"
        yield f"loss on {items} of the history (nats per token): {change}"
    if asked is not None and asked["groups"] is not None and asked["users"] is not None:
        better = "" if asked["higher_is_better"] else " (lower is better)"
        change = f"{decimal(asked['groups'])} with groups, {decimal(asked['users'])} with users"
        many = plural(asked["queries"] or 0, "query")
        mean = f", means of {asked['seeds']} seeds" if (asked["seeds"] or 1) > 1 else ""
        yield f"{metric_name(str(asked['metric']))} on {many} in the last evaluation{better}: {change}{mean}"
    if held is None and asked is None:
        yield "gain over the groups: not measured"


def _version(each: Mapping[str, Any], state: str) -> Iterator[str]:
    made = each["made"]
    yield f"  version {each['version']} ({state}): tier {each['tier']}, {size(each['bytes'])}, {_date(each['written'])}"
    yield f"    made by {MAKERS.get(made['by'], made['by'])}: {made['why']}"
    if made["by"] in RESTORED and "written" in made:
        yield f"    its content is of {_date(made['written'])}"
    decided = {True: "promoted to an adapter", False: "not promoted", None: ""}[made["promoted"]]
    losses = made["losses"]
    if losses is not None:
        compared = f"held-out loss {decimal(losses['group'])} with groups, {decimal(losses['user'])} with the adapter"
        decided = f"{decided}: {compared}" if decided else compared
    if decided:
        yield f"    {decided}"
    source = each["from"]
    if source is not None:
        rows = [f"rows {ranges(source['rows'])} of the run's data"] if source["rows"] else []
        logged = [f"logged {', '.join(map(_shown, source['logged']))}"] if source["logged"] else []
        yield f"    from {plural(len(source['rows']) + len(source['logged']), 'item')}: {'; '.join(rows + logged)}"
    if each["checksum"] is not None:
        yield f"    xxh3 of the adapter: {each['checksum']}"


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending or unordered whole numbers as ranges: 1-4, 7, 9-11."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)


def _date(written: float) -> str:
    return datetime.fromtimestamp(written, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _shown(text: str) -> str:
    """Return an id, escaped if control characters in it would break the lines."""
    return text if text.isprintable() else repr(text)
