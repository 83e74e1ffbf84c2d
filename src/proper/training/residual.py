"""Training rows of the `residual` form of the user prior: each interaction is a choice among the labels.

    -log softmax_y(s(y | x) + log pi_u(y) - log pi(y))

The model of stage 1 has learnt the frequency of each label, pi(y), so the user prior enters as its ratio to pi: with
log pi_u alone, frequent labels would count twice at the start. pi_u is computed from the user's answers before the
interaction, as for a query at its place; a prior from all other answers would reveal the answer that it leaves out.
With more than `MAX_LABELS` labels, the sum over the others is estimated from a seeded sample of them: their terms get
the factor (L - 1) / (sampled - 1), which makes the estimate unbiased.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from proper.data.encoder import EncodedExample, Encoder, HistoryRow
from proper.data.label_tree import LabelChoice, LabelTree
from proper.data.prior import EarlierPriors, Floats
from proper.training.checkpoint import seed_of

MAX_LABELS = 32
"""Labels of one interaction: their tokens run through the model behind the prompt."""


@dataclass(frozen=True, eq=False)
class ResidualEncoder:
    """The `RowEncoder` of this form; an answer that is none of the labels joins them with the smallest share."""

    encoder: Encoder
    priors: EarlierPriors
    seed: int
    most: int = MAX_LABELS

    @property
    def max_length(self) -> int:
        """Longest prompt with one label, in tokens."""
        return self.encoder.max_length

    @cached_property
    def _labels(self) -> list[tuple[int, ...]]:
        return [self.encoder.answer(label) for label in self.priors.labels]

    @cached_property
    def _room(self) -> int:
        return max(map(len, self._labels))

    def encode(self, example: HistoryRow, /) -> EncodedExample:
        """Encode an interaction of the histories as a choice among labels."""
        answer, shares = self.priors.before(example)
        chosen = self._candidates(example, answer)
        logs = torch.from_numpy(habit(shares, self.priors.population)).float()
        tokens = [self._labels[at] for at in chosen]
        known = int(answer >= 0)
        prior = logs[chosen] + math.log(max(1, len(self._labels) - known) / max(1, len(chosen) - known))
        if known:
            prior[chosen.index(answer)] = logs[answer]
        else:
            tokens, prior = [*tokens, self.encoder.answer(example.target)], torch.cat([prior, logs.min().view(1)])
        tree = _tree(tuple(tokens))
        prompt = self.encoder.prompt(example.prompt, room=self._room)
        at = chosen.index(answer) if answer >= 0 else len(chosen)
        ids = (*prompt, *tree.tokens.tolist())
        return EncodedExample(example.user, ids, len(prompt), choice=LabelChoice(tree, prior, at))

    def _candidates(self, example: HistoryRow, answer: int) -> list[int]:
        """Return the labels of the sum: all, or the answer and a sample of the others that depends on the item only."""
        labels = range(len(self._labels))
        if len(labels) <= self.most:
            return list(labels)
        others = [at for at in labels if at != answer]
        draw = random.Random(seed_of(self.seed, "labels", example.user, example.id))
        return sorted([*draw.sample(others, self.most - 1), *([answer] if answer >= 0 else [])])


def habit(shares: Floats, population: Floats) -> Floats:
    """Return log pi_u - log pi, from shares with any leading axes `(..., L)`."""
    return np.asarray(np.log(shares) - np.log(population))


@lru_cache(maxsize=256)
def _tree(labels: Sequence[Sequence[int]]) -> LabelTree:
    return LabelTree.of(labels)
