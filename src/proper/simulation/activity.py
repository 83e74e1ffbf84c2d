"""Activity of users: the Zipf-Mandelbrot law of their requests, the daily cycle, token counts.

There is no object per user: users are numbers (1 is the most active), drawn from the law.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from proper.simulation.schema import ActivityConfig, TokenCounts

HEAD = 1 << 16
"""Ranks whose weights are summed exactly; the weights of later ranks are integrals over [k - 1/2, k + 1/2]."""
DAY = 86_400.0


class ZipfLaw:
    """Zipf-Mandelbrot law over the ranks 1 to `users`: the weight of rank k is (k + shift) ** -exponent.

    Drawing inverts the cumulative distribution: a table for the first `HEAD` ranks, the closed form of the integral for
    the others (midpoint rule, whose relative error at rank k is about exponent**2 / (24 k**2)).

    Args:
        users: number of ranks.
        exponent: the exponent, at least 0.
        shift: the shift q, above -1/2.
    """

    def __init__(self, users: int, exponent: float, shift: float = 0.0) -> None:
        self.users, self.exponent, self.shift = users, exponent, shift
        head = np.arange(1, min(users, HEAD) + 1, dtype=np.float64)
        self._head = np.cumsum((head + shift) ** -exponent)
        self._cut = float(len(head)) + 0.5
        self._total = float(self._head[-1]) + self._integral(self._cut, users + 0.5)

    def weights(self, ranks: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the probability of each rank, shape (N,)."""
        return np.asarray((ranks + self.shift) ** -self.exponent / self._total, dtype=np.float64)

    def draw(self, random: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Return `count` independent ranks, shape (N,)."""
        mass = random.random(count) * self._total
        ranks = np.searchsorted(self._head, mass, side="right") + 1
        tail = mass >= self._head[-1]
        if tail.any():
            ranks[tail] = self._inverse(mass[tail] - self._head[-1])
        return np.minimum(ranks, self.users).astype(np.int64)

    def slice(self, share: float) -> ZipfLaw:
        """Return the law of every (1 / share)-th user, those in the middle of each block of 1 / share ranks.

        The weights of the ranks c (k - 1/2) + 1/2, with c = 1 / share, are again a Zipf-Mandelbrot law over k.
        """
        if share >= 1:
            return self
        return ZipfLaw(max(1, round(self.users * share)), self.exponent, (self.shift + 0.5) * share - 0.5)

    def _integral(self, low: float, high: float) -> float:
        a, b = low + self.shift, high + self.shift
        if b <= a:
            return 0.0
        if self.exponent == 1:
            return math.log(b / a)
        power = 1 - self.exponent
        return float((b**power - a**power) / power)

    def _inverse(self, mass: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the ranks at which the integral from the end of the head reaches `mass`."""
        start = self._cut + self.shift
        if self.exponent == 1:
            at = start * np.exp(mass)
        else:
            power = 1 - self.exponent
            at = (start**power + power * mass) ** (1 / power)
        return np.floor(at - self.shift + 0.5).astype(np.int64)


@dataclass(frozen=True)
class Arrival:
    """One request: seconds since the start of the simulated day, user (rank), prompt tokens, answer tokens."""

    time: float
    user: int
    prompt: int
    answer: int


@dataclass(frozen=True)
class DailyCycle:
    """The rate of requests over a day of `length` seconds, which starts twelve hours before the peak.

    Attributes:
        rate: mean requests per second.
        swing: the rate varies between 1 - swing and 1 + swing times the mean.
        peak_hour: hour of the highest rate.
        length: seconds of the simulated day; below `DAY` the cycle runs faster and rates keep their size.
    """

    rate: float
    swing: float
    peak_hour: float
    length: float = DAY

    def factor(self, time: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the rate at each time, over the mean rate."""
        found: NDArray[np.float64] = 1 - self.swing * np.cos(2 * np.pi * time / self.length)
        return found

    def hour(self, time: float) -> int:
        """Return the hour of the day, 0 to 23."""
        return int(24 * time / self.length + self.peak_hour - 12) % 24

    def times(self, random: np.random.Generator, block: int = 8192) -> Iterator[NDArray[np.float64]]:
        """Yield the times of a Poisson process with this rate in blocks, by thinning."""
        top, now = self.rate * (1 + self.swing), 0.0
        while now < self.length:
            candidates = now + np.cumsum(random.exponential(1 / top, block))
            now = float(candidates[-1])
            kept = random.random(block) * (1 + self.swing) < self.factor(candidates)
            yield candidates[kept & (candidates < self.length)]


def arrivals(law: ZipfLaw, cycle: DailyCycle, activity: ActivityConfig, seed: int) -> Iterator[Arrival]:
    """Yield the requests of one simulated day in order of time; equal seeds give equal requests."""
    random = np.random.default_rng([seed, 1])
    for times in cycle.times(random):
        count = len(times)
        users = law.draw(random, count).tolist()
        prompts = _tokens(activity.prompt_tokens, random, count)
        answers = _tokens(activity.answer_tokens, random, count)
        for time, user, prompt, answer in zip(times.tolist(), users, prompts, answers, strict=True):
            yield Arrival(time, user, prompt, answer)


def _tokens(counts: TokenCounts, random: np.random.Generator, number: int) -> list[int]:
    if counts.cv == 0:
        return [round(counts.mean)] * number
    sigma = math.sqrt(math.log1p(counts.cv**2))
    found = random.lognormal(math.log(counts.mean) - sigma**2 / 2, sigma, number)
    return [int(value) for value in np.maximum(1, np.rint(found))]


def mixed_bits(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a well-mixed 64-bit hash of each value (the finalizer of SplitMix64), shape (N,)."""
    x = values + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_of(value: int) -> int:
    """Return a well-mixed 64-bit hash of one number: `mixed_bits` without numpy's cost per call."""
    mask = 0xFFFFFFFFFFFFFFFF
    x = (value + 0x9E3779B97F4A7C15) & mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return x ^ (x >> 31)
