"""Methods `groups+head` and `users+head`: the mean of the label probabilities of a stage and of `head+prior`.

    (p_stage(y | x, u) + p_head(y | x, u)) / 2                label: argmax; rating: median

The weights are equal, so nothing is chosen and no adapter is trained again (a linear opinion pool: Stone, 1961).
On no data set of docs/findings.md is the mean better than `head+prior`.
"""

from __future__ import annotations

from collections.abc import Callable

from proper.evaluation.runner import MethodRun
from proper.methods.evaluate import answered
from proper.methods.head import HEAD
from proper.methods.prior import log_mixture, log_probabilities, queries_of, score_as, with_scores
from proper.methods.spec import TrainedRun
from proper.run_folder import RunFolder, Tier


def with_head(tier: Tier) -> Callable[[TrainedRun], MethodRun]:
    """Answer with the mean of a tier's label probabilities and those of `head+prior`."""

    def answer(trained: TrainedRun) -> MethodRun:
        stage = score_as(tier, trained)
        head = answered(HEAD, trained, RunFolder(trained.folder), label_scores=True)
        by_id = {row.id: row.label_scores or [] for row in head.predictions}
        asked = queries_of(stage, trained.dataset)
        of_stage = log_probabilities([row.label_scores or [] for row in stage.predictions])
        of_head = log_probabilities([by_id[row.id] for row in stage.predictions])
        found = with_scores(trained, stage.predictions, asked, log_mixture(of_stage, of_head, 0.5))
        return MethodRun(found, stage.seconds + head.seconds, stage.tokens + head.tokens)

    return answer
