"""Summary of each group of a run: load, typical users, and overrepresented words and labels, as JSON values.

Reads the routing that the evaluation measured and the histories of the run's data; no model is loaded. A user counts to
the group with the largest mean gate (`evaluation.routing.main_experts`).

Words and labels are compared between the items of a group's users and those of all other users by the log-odds ratio
with an informative prior (Monroe, Colaresi & Quinn 2008, "Fightin' Words", eq. 15, 16 and 22), in standard deviations.
An item counts a word once. The prior is the whole population's rate of the word, worth `PRIOR` items, so that rare
words need evidence. The paper's variance (eq. 20) leaves out the items without the word, which are few for a word of a
template; here all four cells count, as for any log-odds ratio.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from proper.data.chat import readable
from proper.data.dataset import Dataset
from proper.data.histories import TextExample
from proper.errors import InputError, RunFolderError
from proper.reports.formats import plural
from proper.reports.reading import count, number, objects, read_object
from proper.run_folder import RunFolder

PRIOR = 100.0
"""Weight of the prior, in items of the average user."""
MIN_Z = 1.96
"""Standard deviations from which a word is listed: the two-sided 5 % point of a single comparison."""
WORDS, LABELS, TYPICAL, EXAMPLES = 10, 5, 5, 3
_WORD = re.compile(r"[^\W\d_][\w'-]+")


def group_summary(folder: Path, group: int | None = None) -> list[dict[str, Any]]:
    """Return one object per group: `group`, `utilization`, `users`, `typical`, `words`, `labels`, `examples`.

    `utilization` is the mean gate over all users, `users` the number whose main group it is, `typical` those with the
    highest mean gate. `words` and `labels` have the log-odds `z`, and how many items of the group's users have them out
    of how many; words of one user alone are left out. `examples` are items of typical users with many such words.

    Args:
        folder: the run folder.
        group: one group; None for all.

    Raises:
        RunFolderError: the run has no routing yet, or its data is gone.
        InputError: there is no such group.
    """
    routing = read_object(RunFolder(folder).routing)
    users = [row for row in objects(routing.get("users")) if isinstance(row.get("gates"), list)]
    if not users:
        raise RunFolderError(f"{folder}: no routing was measured yet; run: proper evaluate {folder} --methods groups")
    used = routing.get("utilization")
    shares = [number(share) or 0.0 for share in used] if isinstance(used, list) else []
    groups = range(len(shares))
    if group is not None and group not in groups:
        raise InputError(f"--group {group}: the run has groups 0 to {len(shares) - 1}")
    with closing(Dataset.open(RunFolder(folder).home.data)) as dataset:
        counts = _counts(dataset, users, len(shares))
        wanted = groups if group is None else [group]
        return [_group(dataset, users, counts, at, shares[at]) for at in wanted]


def _group(
    dataset: Dataset, users: Sequence[dict[str, Any]], counts: _Counts, at: int, utilization: float
) -> dict[str, Any]:
    typical = sorted(users, key=lambda row: (-_gate(row, at), str(row["user"])))[:TYPICAL]
    words = counts.raised("word", at, WORDS)
    return {
        "group": at,
        "utilization": utilization,
        "users": sum(row.get("main") == at for row in users),
        "typical": [{"user": row["user"], "gate": _gate(row, at)} for row in typical],
        "words": words,
        "labels": counts.raised("label", at, LABELS) if _labelled(dataset) else [],
        "examples": _examples(dataset, typical, {each["text"]: each["z"] for each in words}),
    }


def _gate(row: dict[str, Any], at: int) -> float:
    gates = row["gates"]
    return number(gates[at]) or 0.0 if at < len(gates) else 0.0


class _Counts:
    """Numbers of items that have a word or a label, by group and in all, and how many users of a group have it."""

    def __init__(self, groups: int) -> None:
        self.having = [Counter[tuple[str, str]]() for _ in range(groups)]
        self.users = [Counter[tuple[str, str]]() for _ in range(groups)]
        self.all = Counter[tuple[str, str]]()
        self.items = [0] * groups

    def add(self, group: int, history: Sequence[TextExample], labelled: bool) -> None:
        """Count one user's history."""
        found = [set(_features(example, labelled)) for example in history]
        for each in found:
            self.having[group].update(each)
            self.all.update(each)
        self.users[group].update(set[tuple[str, str]]().union(*found))
        self.items[group] += len(history)

    def raised(self, kind: str, group: int, most: int) -> list[dict[str, Any]]:
        """Return the words or labels with the highest log-odds in a group, highest first."""
        inside, total = self.items[group], sum(self.items)
        rows = list[dict[str, Any]]()
        for key, having in self.having[group].items():
            if key[0] != kind or (kind == "word" and self.users[group][key] < 2):
                continue
            z = log_odds(having, inside, self.all[key] - having, total - inside)
            if z >= MIN_Z:
                rows.append({"text": key[1], "z": round(z, 2), "items": having, "of": inside})
        return sorted(rows, key=lambda row: (-float(row["z"]), str(row["text"])))[:most]


def log_odds(having: int, of: int, others_having: int, others_of: int) -> float:
    """Return the log-odds ratio of a feature between two sets of items, in standard deviations; 0 without items.

    Args:
        having: number of items of the set that have the feature.
        of: number of items of the set.
        others_having: number of items of the others that have it.
        others_of: number of items of the others.
    """
    if not of or not others_of:
        return 0.0
    yes = PRIOR * (having + others_having + 0.5) / (of + others_of + 1)
    no = PRIOR - yes
    ours = math.log((having + yes) / (of - having + no))
    theirs = math.log((others_having + yes) / (others_of - others_having + no))
    cells = (having + yes, of - having + no, others_having + yes, others_of - others_having + no)
    return (ours - theirs) / math.sqrt(sum(1 / cell for cell in cells))


def _counts(dataset: Dataset, users: Sequence[dict[str, Any]], groups: int) -> _Counts:
    counts = _Counts(groups)
    for row in users:
        main = count(row.get("main"))
        if main is not None and 0 <= main < groups:
            counts.add(main, dataset.history(str(row["user"])), _labelled(dataset))
    return counts


def _labelled(dataset: Dataset) -> bool:
    """Whether all answers are labels; those of several tasks count as text."""
    return bool(dataset.labels) and not dataset.tasks


def _features(example: TextExample, labelled: bool) -> Iterator[tuple[str, str]]:
    text = example.prompt if labelled else f"{example.prompt} {example.target}"
    for found in _WORD.finditer(text):
        yield "word", found[0].lower()
    if labelled:
        yield "label", example.target


def _examples(dataset: Dataset, typical: Sequence[dict[str, Any]], words: dict[str, float]) -> list[dict[str, Any]]:
    """Return items of typical users, at most one of each, those whose words the group raises most."""
    found = []
    for row in typical:
        history = dataset.history(str(row["user"]))
        if history:
            scored = [(sum(words.get(word, 0.0) for _, word in set(_features(each, False))), each) for each in history]
            best = max(scored, key=lambda pair: (pair[0], -pair[1].id))[1]
            found.append({"user": best.user, "row": best.id, "prompt": readable(best.prompt), "target": best.target})
    return found[:EXAMPLES]


def group_lines(summary: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines that tell a summary in plain words."""
    for each in summary:
        share = f"{100 * each['utilization']:.0f} %"
        yield f"group {each['group']}: {share} of the mean gate; main group of {plural(each['users'], 'user')}"
        typical = ", ".join(f"{row['user']} ({row['gate']:.2f})" for row in each["typical"])
        yield f"  typical users, by mean gate: {typical}"
        for name in ("words", "labels"):
            if each[name]:
                shown = ", ".join(f"{row['text']} (z {row['z']:.1f})" for row in each[name])
                yield f"  overrepresented {name}, against other users: {shown}"
        if not each["words"] and not each["labels"]:
            yield f"  no word or label is overrepresented by {MIN_Z} standard deviations or more"
        for row in each["examples"]:
            yield f"  example, {row['user']} row {row['row']}: {_short(row['prompt'])} -> {_short(row['target'])}"


def _short(text: str, most: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
