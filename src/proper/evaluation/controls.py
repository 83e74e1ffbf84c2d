"""What a claim of personalization rests on: the stages against controls that have everything but the users.

    groups against population-more     the same rows, steps and parameters, one LoRA, no users
    groups against groups-shared-e     experts and router, everybody the same embedding
    users  against swapped             another user's embedding and adapter
    users  against shuffled            trained on rows dealt out to the wrong users

The last stands for "the gain with real ids exceeds that with shuffled ids": both are gains over one population, which
cancels. Knows nothing about how controls are trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LEVEL = 0.05

CONTROLS = (
    ("groups", "population-more"),
    ("groups", "groups-shared-e"),
    ("users", "swapped"),
    ("users", "shuffled"),
)


def claim(comparisons: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the `personalization` of `results.json`; None where no control was run.

    `claimed` is True where every control is beaten on the main metric at p < .05, adjusted over the controls; None
    where all that were run are beaten and some are missing.
    """
    rows = {(row["method"], row["against"]): row for row in comparisons if row["primary"]}
    found = {pair: rows[pair] for pair in CONTROLS if pair in rows}
    if not found:
        return None
    beaten = {pair: _is_beaten(row) for pair, row in found.items()}
    missing = [against for pair in CONTROLS if pair not in found for against in pair[1:]]
    return {
        "claimed": False if not all(beaten.values()) else None if missing else True,
        "beaten": [f"{method} > {against}" for (method, against), won in beaten.items() if won],
        "not_beaten": [f"{method} > {against}" for (method, against), won in beaten.items() if not won],
        "missing": missing,
    }


def _is_beaten(row: Mapping[str, Any]) -> bool:
    better = row["difference"] > 0 if row["higher_is_better"] else row["difference"] < 0
    return bool(better and row["p_adjusted"] < LEVEL)
