"""Conclusions from the finished rows of results.json: the claim of personalization, and failure signatures.

A signature is a sentence that diagnoses overlapping mixtures, unused experts, overfitting or a missing gain; it holds
the numbers that it is based on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from proper.evaluation.comparisons import CONSTANT, CONTROLS, TRIVIAL
from proper.evaluation.metrics import Prediction
from proper.evaluation.statistics import smallest_p
from proper.run_folder import STAGE_METHODS

LEVEL = 0.05
"""Significance level of the tests, after Holm's adjustment."""

OVERLAP = 0.95
"""Cosine between users' mean gates above which mixtures count as identical."""

ONE_ANSWER = 0.9
"""Share of the queries from which one answer counts as a constant, unless the queries themselves have one label."""

UNUSED = 0.1
"""Fraction of the uniform load below which an expert counts as unused."""

OVERFIT = 1.5
"""Ratio of query loss to history loss from which a user counts as overfitted."""


def claim(comparisons: Sequence[Mapping[str, Any]], trivial: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """Return the `personalization` of `results.json`; None if no control was run.

    `claimed` is True if every control is beaten on the main metric at p < .05, adjusted over the controls; None if all
    controls that were run are beaten but some are missing. A gain over an undertrained population is never claimed.
    """
    rows = {(row["method"], row["against"]): row for row in comparisons if row["primary"]}
    found = {pair: rows[pair] for pair in CONTROLS if pair in rows}
    if not found:
        return None
    beaten = {pair: _is_beaten(row) for pair, row in found.items()}
    missing = [against for pair in CONTROLS if pair not in found for against in pair[1:]]
    undertrained = bool(trivial and trivial["undertrained"])
    return {
        "claimed": False if undertrained or not all(beaten.values()) else None if missing else True,
        "undertrained": undertrained,
        "beaten": [f"{method} > {against}" for (method, against), won in beaten.items() if won],
        "not_beaten": [f"{method} > {against}" for (method, against), won in beaten.items() if not won],
        "missing": missing,
    }


def against_trivial(
    metrics: Sequence[Mapping[str, Any]], comparisons: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Return the `trivial` of `results.json`: how the stages compare with rows that need no model.

    `stage` is the last evaluated stage and `best` the best trivial row. `beaten` lists the trivial rows that the stage
    beats on the main metric at p < .05, adjusted over them; `wins` those with a better value than the stage; `unclear`
    the rest. `undertrained` is whether population's value is no better than the best constant's (unless it is perfect),
    None if one of the two was not evaluated. `sentences` state the unfavourable results.

    Args:
        metrics: as in `results.json`.
        comparisons: as in `results.json`, adjusted.

    Returns:
        None without a trivial row or without a stage.
    """
    values = {row["method"]: row for row in metrics if row["primary"]}
    names = [name for name in TRIVIAL if name in values]
    stages = [stage for stage in STAGE_METHODS if stage in values]
    if not names or not stages:
        return None
    stage, tested = stages[-1], {(row["method"], row["against"]): row for row in comparisons if row["primary"]}
    sign = 1 if values[stage]["higher_is_better"] else -1
    score = {name: sign * row["value"] for name, row in values.items()}
    beaten = [name for name in names if (row := tested.get((stage, name))) and _is_beaten(row)]
    wins = sorted((name for name in names if score[name] > score[stage]), key=lambda name: -score[name])
    undertrained = None
    if "population" in values and CONSTANT in values:
        undertrained = score["population"] <= score[CONSTANT] and not _is_perfect(values["population"])
    found = {
        "methods": names,
        "stage": stage,
        "best": max(names, key=lambda name: score[name]),
        "beaten": beaten,
        "wins": wins,
        "unclear": [name for name in names if name not in (*beaten, *wins)],
        "undertrained": undertrained,
    }
    family = sum(row["family"] == "trivial" for row in tested.values())
    few = max(1, family) * smallest_p(values[stage]["users"]) >= LEVEL
    return {**found, "sentences": [*_undertrained(found, values, tested, few), *_trivial_wins(found, values, few)]}


def _undertrained(
    found: Mapping[str, Any],
    values: Mapping[str, Mapping[str, Any]],
    tested: Mapping[tuple[str, str], Any],
    few: bool,
) -> list[str]:
    if found["undertrained"] is None:
        return []
    population, constant = values["population"], values[CONSTANT]
    if _is_perfect(constant):
        return [
            f"One constant answers every query, {CONSTANT} ({constant['metric']} {constant['value']:.4f}): these "
            "queries cannot show a gain of a method."
        ]
    size = f"{population['metric']} {population['value']:.4f} against {constant['value']:.4f}"
    if found["undertrained"]:
        return [
            f"Population is undertrained: it is no better than the best constant, {CONSTANT} ({size}). No gain over it "
            "counts as personalization. Stage 1 needs more tokens (population.max_tokens, population.epochs) or "
            "smaller batches (population.batch_size)."
        ]
    row = tested.get(("population", CONSTANT))
    if few or row is None or _is_beaten(row):
        return []
    return [
        f"Population is not measurably better than the best constant, {CONSTANT} ({size}, adjusted "
        f"p = {row['p_adjusted']:.3f}): it is undertrained, or there are too few queries to tell."
    ]


def _is_perfect(row: Mapping[str, Any]) -> bool:
    return bool(row["value"] == (1 if row["higher_is_better"] else 0))


def one_answer(predictions: Sequence[Prediction], labels: Sequence[str]) -> list[str]:
    """Return the signature of a population that gives the same label to nearly all queries."""
    if not labels or not predictions:
        return []
    answer, given = Counter(row.prediction for row in predictions).most_common(1)[0]
    _, most = Counter(row.target for row in predictions).most_common(1)[0]
    if given < ONE_ANSWER * len(predictions) or most >= ONE_ANSWER * given:
        return []
    return [
        f"Population answers {answer!r} to {given} of {len(predictions)} queries, and the most frequent label is right "
        f"for {most}: stage 1 is undertrained."
    ]


def _trivial_wins(found: Mapping[str, Any], values: Mapping[str, Mapping[str, Any]], few: bool) -> list[str]:
    stage = found["stage"]

    def sizes(names: Sequence[str]) -> str:
        return ", ".join(f"{name} ({values[name]['value']:.4f})" for name in names)

    own = f"{stage} ({values[stage]['metric']} {values[stage]['value']:.4f})"
    sentences = []
    if found["wins"]:
        sentences.append(f"Trivial rows, without a model, are better than {own}: {sizes(found['wins'])}.")
    if few:
        users = values[stage]["users"]
        sentences.append(
            f"{users} target user{'s are' if users > 1 else ' is'} too few for a significant difference "
            f"(p < .05, adjusted) between {own} and these trivial rows: {sizes(found['methods'])}."
        )
    elif found["unclear"]:
        sentences.append(f"Not measurably worse than {own} are these trivial rows: {sizes(found['unclear'])}.")
    return sentences


def _is_beaten(row: Mapping[str, Any]) -> bool:
    better = row["difference"] > 0 if row["higher_is_better"] else row["difference"] < 0
    return bool(better and row["p_adjusted"] < LEVEL)


def failure_signatures(
    *,
    routing: Mapping[str, Any],
    comparisons: Sequence[Mapping[str, Any]],
    gains: Sequence[Mapping[str, Any]],
    query_losses: Mapping[str, float],
    history_losses: Mapping[str, float],
    trivial: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return the signatures that apply, one or two sentences each, the most severe first.

    Args:
        routing: as in `results.json`; may be empty.
        comparisons: as in `results.json`, adjusted.
        gains: users' rows as in `users.json`, shortest history first.
        query_losses: by user, answer loss of the last stage on queries (nats per token).
        history_losses: by user, the same on the user's own history.
        trivial: as in `results.json`.
    """
    return [
        *(trivial["sentences"] if trivial else []),
        *_steps(comparisons),
        *_worse_users(gains),
        *_overlap(routing),
        *_overfit(query_losses, history_losses),
    ]


def _steps(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    for row in comparisons:
        if row["family"] != "primary":
            continue
        better = row["difference"] > 0 if row["higher_is_better"] else row["difference"] < 0
        step = f"{row['method']} against {row['against']}"
        size = f"{row['metric']} {row['difference']:+.4f}, adjusted p = {row['p_adjusted']:.3f}"
        if row["difference"] == row["resolvable"] == 0:
            found.append(f"No gain from {step}: every user's {row['metric']} is the same with both.")
        elif row["p_adjusted"] >= LEVEL:
            text = f"No measurable gain from {step} ({size})"
            if math.isfinite(row["resolvable"]):
                shown = f"{row['resolvable']:.4f}"
                text += f": the smallest difference that these users would show with 80 % power is about {shown}"
            found.append(f"{text}.")
        elif not better:
            found.append(f"A measurable loss from {step} ({size}): this stage made answers worse.")
    return found


def _worse_users(gains: Sequence[Mapping[str, Any]]) -> list[str]:
    known = [row for row in gains if row["gain_users"] is not None]
    worse = [row for row in known if row["gain_users"] < 0]
    if not worse:
        return []
    better = sum(row["gain_users"] > 0 for row in known)
    text = f"Stage 3 is worse than stage 2 for {len(worse)} of {len(known)} users and better for {better}"
    half = len(known) // 2
    short, long = known[:half], known[half:]
    if short and short[0]["history"] < long[-1]["history"]:
        text += f"; worse for {_worse_in(short)} and for {_worse_in(long)}"
    return [f"{text}. Where the history is too short, the group tier serves such a user better."]


def _worse_in(rows: Sequence[Mapping[str, Any]]) -> str:
    worse = sum(row["gain_users"] < 0 for row in rows)
    return f"{worse} of the {len(rows)} users with {rows[0]['history']} to {rows[-1]['history']} interactions"


def _overlap(routing: Mapping[str, Any]) -> list[str]:
    found = []
    shares = routing.get("utilization") or []
    cosine = routing.get("constraint_cosine")
    if len(shares) > 1 and cosine is not None and cosine > OVERLAP:
        found.append(
            f"Users' expert mixtures overlap: their mean cosine is {cosine:.3f}. Either the constraint does not work, "
            f"or there are more experts ({len(shares)}) than groups to tell apart."
        )
    unused = [index for index, share in enumerate(shares) if share < UNUSED / len(shares)]
    if unused:
        names = ", ".join(str(index) for index in unused)
        verb = "is" if len(unused) == 1 else "are"
        found.append(f"{len(unused)} of {len(shares)} experts {verb} almost unused ({names}): fewer would do.")
    return found


def _overfit(query_losses: Mapping[str, float], history_losses: Mapping[str, float]) -> list[str]:
    both = sorted(set(query_losses) & set(history_losses))
    high = [user for user in both if query_losses[user] > OVERFIT * history_losses[user]]
    queries, histories = [query_losses[user] for user in both], [history_losses[user] for user in both]
    if not both or (fmean(queries) <= OVERFIT * fmean(histories) and 2 * len(high) <= len(both)):
        return []
    return [
        f"Stage 3 overfits: answer loss is {fmean(queries):.3f} nats per token on queries and {fmean(histories):.3f} "
        f"on the users' own histories; for {len(high)} of {len(both)} users it is more than {OVERFIT} times as high."
    ]
