"""Example queries for the report, with the answers of the population, group and user model side by side.

Examples are chosen by rule: wins and losses of both steps in turn, the largest score difference first, each user at
most once while other users remain. Predictions are read in two passes, so memory holds scores, never all texts.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from proper.reports.load import RunFiles
from proper.reports.reading import count, number, read_lines
from proper.run_folder import STAGE_METHODS, RunFolder

STAGES = STAGE_METHODS[1:]
_ONE: Mapping[str, str] = {}
WHY = {
    ("users", 1): "The user model wins",
    ("users", -1): "The user model loses",
    ("groups", 1): "The group model wins",
    ("groups", -1): "The group model loses",
    ("any", 0): "Different text, same score",
}


@dataclass(frozen=True, slots=True)
class ExampleAnswer:
    """The answer of one method; a higher `score` is better."""

    method: str
    text: str
    score: float
    verdict: str
    loss: float | None


@dataclass(frozen=True, slots=True)
class ReportExample:
    """One query with the answers of the stages, in their order."""

    id: str
    user: str
    why: str
    prompt: str
    target: str
    history: int | None
    tier: str
    answers: tuple[ExampleAnswer, ...]


@dataclass(frozen=True, slots=True)
class _Scored:
    user: str
    scores: tuple[float, ...]
    texts: tuple[str, ...]  # digests of the predictions, since the choice needs only their equality


def task_kinds(run: RunFiles) -> dict[str, str]:
    """Return the kind of each task by name, for a run of several."""
    return {str(row.get("name")): str(row.get("kind")) for row in run.rows("tasks")}


def choose_examples(
    folder: Path, kind: str, wanted: int, kinds: Mapping[str, str] = _ONE
) -> list[ReportExample] | None:
    """Return at most `wanted` examples, or None if fewer than two stages have predictions.

    `kinds` are the kinds of several tasks by name (`task_kinds`); `kind` is that of all other queries.
    """
    paths = {method: RunFolder(folder).predictions_of(method) for method in STAGES}
    methods = [method for method in STAGES if paths[method].is_file()]
    if len(methods) < 2:
        return None
    scored = _score_all([paths[method] for method in methods], kind, kinds)
    chosen = _choose(scored, methods, wanted)
    return _read_texts(chosen, methods, paths, kind, kinds)


def user_examples(folder: Path, kind: str, user: str, kinds: Mapping[str, str] = _ONE) -> list[ReportExample]:
    """Return all queries of one user with the answers of every stage that has predictions, in the files' order."""
    examples: dict[str, ReportExample] = {}
    known = [method for method in STAGE_METHODS if RunFolder(folder).predictions_of(method).is_file()]
    for done, method in enumerate(known):
        for row in read_lines(RunFolder(folder).predictions_of(method)):
            name = str(row.get("id"))
            if row.get("user") == user and (name in examples or not done):
                example = examples.get(name) or _new_example(name, "", row)
                examples[name] = _answered(example, done, method, row, _kind(row, kind, kinds))
    return [replace(example, why=_change(example)) for example in examples.values()]


def _change(example: ReportExample) -> str:
    """Return a phrase for what the stages changed, the latest step first."""
    by_method = {answer.method: answer.score for answer in example.answers}
    for above, below in (("users", "groups"), ("groups", "population")):
        if above in by_method and below in by_method and by_method[above] != by_method[below]:
            return WHY[above, 1 if by_method[above] > by_method[below] else -1]
    return "Same score at every stage"


def score(kind: str, target: str, prediction: str) -> float:
    """Return the score of one answer: 1 or 0 for a label, minus the error for a rating, word overlap (F1) for text."""
    if kind == "rating":
        gold, answer = _as_number(target), _as_number(prediction)
        return -9.0 if gold is None or answer is None else -abs(gold - answer)
    if kind == "generation":
        return _overlap(target, prediction)
    return float(target.strip() == prediction.strip())


def _as_number(text: str) -> float | None:
    try:
        return number(float(text.strip()))
    except ValueError:
        return None


def _overlap(target: str, prediction: str) -> float:
    gold, answer = (Counter(re.findall(r"\w+", text.casefold())) for text in (target, prediction))
    shared = (gold & answer).total()
    return 2 * shared / (gold.total() + answer.total()) if shared else 0.0


def _verdict(kind: str, value: float) -> str:
    if kind == "rating":
        return "right" if value == 0 else "not a rating" if value == -9 else f"off by {-value:g}"
    return f"overlap {value:.2f}" if kind == "generation" else ("right" if value == 1 else "wrong")


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def _kind(row: dict[str, Any], kind: str, kinds: Mapping[str, str]) -> str:
    return kinds.get(_text(row, "task"), kind)


def _score_all(paths: Sequence[Path], kind: str, kinds: Mapping[str, str]) -> dict[str, _Scored]:
    """Return the queries that every file answers; the first line of each id counts (later lines are other seeds)."""
    scored: dict[str, _Scored] = {}
    for done, path in enumerate(paths):
        for row in read_lines(path):
            name, text = str(row.get("id")), _text(row, "prediction")
            known = scored.get(name, _Scored(_text(row, "user"), (), ()))
            if len(known.scores) == done:
                value = score(_kind(row, kind, kinds), _text(row, "target"), text)
                scored[name] = replace(known, scores=(*known.scores, value), texts=(*known.texts, _digest(text)))
    return {name: row for name, row in scored.items() if len(row.scores) == len(paths)}


def _choose(scored: dict[str, _Scored], methods: Sequence[str], wanted: int) -> list[tuple[str, str]]:
    """Return (id, reason) pairs, taken in turn from the wins and losses of each step."""
    queues: dict[tuple[str, int], list[tuple[float, str, str]]] = {key: [] for key in WHY}
    for name, row in scored.items():
        if len(set(row.texts)) == 1:
            continue
        changed = False
        for (old, new), method in zip(pairwise(row.scores), methods[1:], strict=True):
            if new != old:
                queues[method, 1 if new > old else -1].append((-abs(new - old), _digest(name), name))
                changed = True
        if not changed:
            queues["any", 0].append((0.0, _digest(name), name))
    for queue in queues.values():
        queue.sort(reverse=True)
    return _take_in_turn(queues, scored, wanted)


def _take_in_turn(
    queues: dict[tuple[str, int], list[tuple[float, str, str]]], scored: dict[str, _Scored], wanted: int
) -> list[tuple[str, str]]:
    chosen: dict[str, str] = {}
    for may_repeat in (False, True):
        seen = {scored[name].user for name in chosen}
        left = {key: list(queue) for key, queue in queues.items()}
        while len(chosen) < wanted and any(left.values()):
            for key, queue in left.items():
                while queue and len(chosen) < wanted:
                    name = queue.pop()[2]
                    if name not in chosen and (may_repeat or scored[name].user not in seen):
                        chosen[name] = WHY[key]
                        seen.add(scored[name].user)
                        break
    return list(chosen.items())


def _read_texts(
    chosen: Sequence[tuple[str, str]],
    methods: Sequence[str],
    paths: dict[str, Path],
    kind: str,
    kinds: Mapping[str, str],
) -> list[ReportExample]:
    reasons = dict(chosen)
    examples: dict[str, ReportExample] = {}
    for done, method in enumerate(methods):
        for row in read_lines(paths[method]):
            name = str(row.get("id"))
            if name not in reasons:
                continue
            example = examples.get(name) or _new_example(name, reasons[name], row)
            examples[name] = _answered(example, done, method, row, _kind(row, kind, kinds))
    return [examples[name] for name, _ in chosen]


def _answered(example: ReportExample, done: int, method: str, row: dict[str, Any], kind: str) -> ReportExample:
    """Add a method's answer to an example with `done` answers; a second line of the same id is of another seed."""
    if len(example.answers) != done:
        return example
    value = score(kind, _text(row, "target"), _text(row, "prediction"))
    answer = ExampleAnswer(method, _text(row, "prediction"), value, _verdict(kind, value), number(row.get("loss")))
    return replace(example, answers=(*example.answers, answer), tier=_text(row, "tier"))


def _new_example(name: str, why: str, row: dict[str, Any]) -> ReportExample:
    user, prompt, target = _text(row, "user"), _text(row, "prompt"), _text(row, "target")
    return ReportExample(name, user, why, prompt, target, count(row.get("history")), _text(row, "tier"), ())


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    return "" if value is None else str(value)
