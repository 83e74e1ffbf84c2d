"""Controls behind a claim of personalization: the stages against methods that lack only the user information.

    groups against population-more     the same rows, steps and parameters, one LoRA, no users
    groups against groups-shared-e     experts and router, one embedding shared by all users
    users  against swapped             another user's embedding and adapter
    users  against shuffled            trained on rows permuted across users

The last comparison tests "the gain with real user ids exceeds the gain with shuffled ids": both gains are over the same
population model, which cancels.
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
    """Return the `personalization` of `results.json`; None if no control was run.

    `claimed` is True if every control is beaten on the main metric at p < .05, adjusted over the controls; None if all
    controls that were run are beaten but some are missing.
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
