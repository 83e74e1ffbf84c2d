"""Trivial rows: answers that need no model, so every table has them.

    global-majority      the best constant: the most frequent label of all histories, or the rating with the lowest MAE
    user-majority        the same from the user's own history
    user-majority-same   the same from the items that a user's adapter is trained on (the newest `users.max_items`, of
                         several tasks together)
    lead                 the first words of the input, as many as the median answer has

For free text a majority is the most frequent answer, or the newest if all differ.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from os.path import commonprefix

from proper.config import Config
from proper.data.conversations import split_turns
from proper.data.dataset import Dataset
from proper.data.histories import TextExample
from proper.data.rows import parse_template
from proper.data.words import word_starts
from proper.evaluation.runner import MethodRun, prediction_of
from proper.methods.spec import TrainedRun


def global_majority(trained: TrainedRun) -> MethodRun:
    """Answer every query with the best constant over all histories."""
    overall = usual(_all_answers(trained.dataset), trained.config.task.kind, trained.dataset.labels)
    return answer_alone(trained, lambda query: overall)


def user_majority(trained: TrainedRun) -> MethodRun:
    """Answer every query with the user's usual answer in the whole history."""
    return _own_usual(trained, None)


def user_majority_same(trained: TrainedRun) -> MethodRun:
    """Answer every query with the user's usual answer among the newest `users.max_items` items."""
    return _own_usual(trained, trained.config.users.max_items)


def lead(trained: TrainedRun) -> MethodRun:
    """Answer every query with the first words of its input, as many as the median answer has."""
    words, text_of = median_words(trained.dataset), InputText(trained.config, trained.dataset)
    return answer_alone(trained, lambda query: first_words(text_of(query.prompt), words))


def first_words(text: str, count: int) -> str:
    """Return the first words of a text, with one space where it has white space."""
    starts = word_starts(text)
    return " ".join((text[: starts[count]] if count < len(starts) else text).split())


def usual(counts: Mapping[str, int], kind: str, labels: Sequence[str]) -> str:
    """Return the usual answer from `counts` (answer to frequency, newest last); "" if `counts` is empty.

    A rating is the label with the lowest mean absolute error, the lower of two equal ones.
    """
    if not counts:
        return ""
    if kind == "rating":
        ratings = [(float(answer), count) for answer, count in counts.items()]
        return min(labels, key=lambda one: (sum(n * abs(float(one) - rating) for rating, n in ratings), float(one)))
    most = max(counts.values())
    return [answer for answer, count in counts.items() if count == most][-1]


def median_words(dataset: Dataset) -> int:
    """Return the median number of words of the answers in all histories, at least 1."""
    lengths = Counter(len(word_starts(target)) for target in _targets(dataset))
    seen, half = 0, sum(lengths.values()) / 2
    for length in sorted(lengths):
        seen += lengths[length]
        if seen >= half:
            return max(1, length)
    return 1


class InputText:
    """The user's text within a prompt: the longest column of the template, without words that all prompts share.

    Data without a template, such as benchmarks, has its fixed words at the ends of every prompt. Of a conversation, it
    is the last message of the user.
    """

    def __init__(self, config: Config, dataset: Dataset) -> None:
        template = parse_template(config.data.prompt, "data.prompt")
        self._pattern = re.compile("(.*?)".join(map(re.escape, template.literals)), re.DOTALL)
        texts = [list(words) for words in {tuple(self._column(query.prompt).split()) for query in dataset.queries()}]
        if len(texts) < 2:
            texts = []  # A single text would be its own fixed words.
        self._front = len(commonprefix(texts))
        self._back = len(commonprefix([text[self._front :][::-1] for text in texts]))

    def __call__(self, prompt: str) -> str:
        """Return the user's text of one prompt."""
        words = self._column(prompt).split()
        return " ".join(words[self._front : len(words) - self._back])

    def _column(self, prompt: str) -> str:
        turns = split_turns(prompt) or []
        own = [turn.text for turn in turns if turn.role == "user"]
        if own:
            return own[-1]
        found = self._pattern.fullmatch(prompt)
        return max(found.groups(), key=len, default=prompt) if found else prompt


def answer_alone(trained: TrainedRun, answer: Callable[[TextExample], str]) -> MethodRun:
    """Answer every query with a function of the query, without a model."""
    started = time.perf_counter()
    histories = {user.id: user.history for user in trained.dataset.users("target")}
    queries = trained.dataset.queries()
    found = [prediction_of(query, answer(query), "trivial", histories.get(query.user, 0)) for query in queries]
    return MethodRun(found, max(time.perf_counter() - started, 1e-9), 0)


def _own_usual(trained: TrainedRun, newest: int | None) -> MethodRun:
    dataset, kind = trained.dataset, trained.config.task.kind
    answers: dict[str, str] = {}

    def answer(query: TextExample) -> str:
        if query.user not in answers:
            seen = dataset.history(query.user)
            if newest is not None:
                kept = _newest(dataset, query.user, newest)
                seen = [item for item in seen if item.id in kept]
            answers[query.user] = usual(_counts(seen), kind, dataset.labels)
        return answers[query.user]

    return answer_alone(trained, answer)


def _newest(dataset: Dataset, user: str, newest: int) -> set[int]:
    """Return the ids of a user's newest history rows, of all tasks if the data set is that of one of several."""
    found = dataset.connection.execute(
        """SELECT r.id FROM main.rows r WHERE r.user = (SELECT number FROM main.users WHERE id = ?)
        AND r.part = 'history' ORDER BY r.id DESC LIMIT ?""",
        (user, newest),
    )
    return {row for (row,) in found}


def _counts(history: Sequence[TextExample]) -> dict[str, int]:
    """Count answers, in the order of their last occurrence."""
    counts: dict[str, int] = {}
    for item in history:
        counts[item.target] = counts.pop(item.target, 0) + 1
    return counts


def _targets(dataset: Dataset) -> Iterator[str]:
    found = dataset.connection.execute(
        "SELECT t.target FROM rows r CROSS JOIN texts t ON t.id = r.text WHERE r.part = 'history'"
    )
    return (target for (target,) in found)


def _all_answers(dataset: Dataset) -> dict[str, int]:
    """Count all users' answers in SQL, since there can be as many as rows; for free text keep the most frequent."""
    found = dataset.connection.execute(
        """SELECT t.target, count(*) FROM rows r CROSS JOIN texts t ON t.id = r.text WHERE r.part = 'history'
        GROUP BY t.target ORDER BY count(*) DESC, t.target LIMIT ?""",
        (-1 if dataset.labels else 1,),
    )
    return dict(reversed(found.fetchall()))
