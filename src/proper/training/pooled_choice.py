"""One choice of passes and adapter scale for all users, from the held-out losses of all trials.

A user's few held-out items decide little: with two of them, the best pass is mostly noise. The mean over all users is
far less noisy, so passes and scale are chosen there: those with the highest lower bound of the mean gain, its mean over
users minus its standard error. Long training at full scale has a high mean by a few users who gain much, while others
lose; the bound prefers a gain that most users share. A scale below 1 shrinks the adapters toward the group model; it
goes into the stored adapters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from proper.errors import RunFolderError
from proper.training.jobs import PARTS, passes_of
from proper.training.tier_selection import Trial


@dataclass(frozen=True)
class Choice:
    """How long adapters are trained, and how strong they are.

    Attributes:
        part: passes, in parts of a user's full passes (`jobs.PARTS`).
        scale: factor on the adapter.
    """

    part: int
    scale: float

    @classmethod
    def read(cls, found: Any, path: Path) -> Choice:
        """Return the choice that a JSON file holds.

        Raises:
            RunFolderError: it is none; the message names the file.
        """
        try:
            return cls(int(found["part"]), float(found["scale"]))
        except (KeyError, TypeError, ValueError) as error:
            raise RunFolderError(f"{path}: key 'choice' has a wrong value; restore a copy of it") from error


ALL_PASSES = Choice(PARTS, 1.0)
"""The full passes at the full scale."""


@dataclass(frozen=True)
class TrialCurve:
    """One user's held-out losses in the trial.

    Attributes:
        items: length of the history, held-out items included.
        held_out: number of held-out items.
        full: the full number of passes.
        scales: the measured scales.
        before: held-out loss per token on the group tier.
        grid: held-out loss per token at each measurement and scale. A user who left the trial early has fewer
            measurements; the last one stands for those that are missing.
        spreads: see `jobs.FitProgress.spreads`.
        variance: variance over held-out items of the loss per token on the group tier.
    """

    user: str
    items: int
    held_out: int
    full: int
    scales: tuple[float, ...]
    before: float
    grid: Sequence[Sequence[float]]
    spreads: Sequence[Sequence[float]]
    variance: float | None = None

    def at(self, choice: Choice) -> Trial:
        """Return the trial's result at a choice."""
        row, column = self._measurement(choice.part), self.scales.index(choice.scale)
        losses = self.before, self.grid[row][column]
        passes = passes_of(self.full, choice.part)
        spread = self.spreads[row][column]
        return Trial(self.user, self.items, *losses, passes, self.held_out, spread, self.variance)

    def _measurement(self, part: int) -> int:
        passes = sorted({passes_of(self.full, each) for each in range(1, PARTS + 1)})
        return min(passes.index(passes_of(self.full, part)), len(self.grid) - 1)


def choose(curves: Sequence[TrialCurve]) -> Choice:
    """Return the choice with the highest lower bound of the mean gain; of equal ones, the least training and scale."""
    if not curves:
        return ALL_PASSES
    choices = [Choice(part, scale) for part in range(1, PARTS + 1) for scale in sorted(curves[0].scales)]
    return max(choices, key=lambda choice: _lower_bound([curve.at(choice).gain for curve in curves]))


def _lower_bound(gains: Sequence[float]) -> float:
    """Return the mean minus its standard error; the gain itself if there is one."""
    error = stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return fmean(gains) - error
