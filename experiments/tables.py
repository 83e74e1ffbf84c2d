"""Markdown tables of the findings page: the main metric with its tests, other metrics, cut prompts, and routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.answers import label
from experiments.paired_tests import Test, is_higher_better, main_metric, main_rows, p_of
from experiments.sources import Source
from proper.reports.formats import METRICS, plain, signed


def table(source: Source, part: Mapping[str, Any], tests: Sequence[Test]) -> list[str]:
    """Return the table of the main metric: a row for each method, with its tests."""
    rows = main_rows(part)
    arrow = "↑" if is_higher_better(part) else "↓"
    seeds = max(len(row.get("by_seed", [0])) for row in rows)
    size = f"{rows[0]['users']} users, {rows[0]['queries']} queries, {seeds} seed{'s' if seeds > 1 else ''}"
    lines = [f"{source.name} ({size})", ""]
    lines += [f"| method | {METRICS[main_metric(part)]} {arrow} [95 %] | seeds | difference [95 %] | p | shows |"]
    lines += ["|---|---|---|---|---|---|"]
    by_method: dict[str, list[Test]] = {}
    for test in tests:
        by_method.setdefault(test.method, []).append(test)
    for row in rows:
        low, high = row["ci95"]
        values = row.get("by_seed", [])
        spread = f"{plain(min(values))} to {plain(max(values))}" if len(values) > 1 else "one"
        cells = [label(row["method"]), f"{plain(row['value'])} [{plain(low)}, {plain(high)}]", spread]
        of_method: Sequence[Test | None] = by_method.get(row["method"]) or [None]
        for at, shown in enumerate(of_method):
            lines.append("| " + " | ".join([*(cells if not at else ["", "", ""]), *_cells(shown)]) + " |")
    return lines


def other_metrics(source: Source, part: Mapping[str, Any]) -> list[str]:
    """Return a folded table of the metrics beside the main one, methods by metrics; nothing if there is none."""
    main = main_metric(part)
    values = {(row["method"], row["metric"]): row["value"] for row in part["metrics"] if row["metric"] != main}
    names = list(dict.fromkeys(metric for _, metric in values))
    if not names:
        return []
    lines = [f"| method | {' | '.join(METRICS[name] for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for method in dict.fromkeys(method for method, _ in values):
        cells = [plain(values.get((method, name))) for name in names]
        lines.append(f"| {label(method)} | {' | '.join(cells)} |")
    return [f"<details><summary>{source.name}: other metrics</summary>", "", *lines, "", "</details>", ""]


def truncated(part: Mapping[str, Any]) -> list[str]:
    """Return a sentence on the queries whose prompt and answer are longer than `compute.max_length`."""
    cut = {row["method"]: row["truncated_prompts"] for row in part.get("cost", []) if row.get("truncated_prompts")}
    if not cut:
        return []
    queries = main_rows(part)[0]["queries"]
    if len(set(cut.values())) == 1 and len(cut) == len(main_rows(part)):
        return [f"Prompts cut to `compute.max_length`: {next(iter(cut.values()))} of {queries}.", ""]
    counts = ", ".join(f"{label(method)} {number}" for method, number in cut.items())
    return [f"Prompts cut to `compute.max_length`, of {queries}: {counts}.", ""]


def _cells(test: Test | None) -> list[str]:
    if test is None:
        return ["", "", ""]
    change = f"{signed(test.difference)} [{signed(test.low)}, {signed(test.high)}] against {label(test.against)}"
    return [change, p_of(test.p).removeprefix("p = ").removeprefix("p "), test.verdict]


def routing(part: Mapping[str, Any]) -> list[str]:
    """Return the table of routing figures; nothing if there are none."""
    if "routing_of" not in part:
        return []
    lines = [
        "| routing, seed 0 | expert utilization | entropy | user-expert mutual information | cosine between users |",
        "|---|---|---|---|---|",
    ]
    for method, row in part["routing_of"].items():
        shares = ", ".join(plain(share, 2) for share in row["utilization"])
        numbers = [row["entropy"], row["user_expert_mutual_information"], row["constraint_cosine"]]
        lines.append(f"| {label(method)} | {shares} | " + " | ".join(plain(number) for number in numbers) + " |")
    return lines
