"""Task table of the LaMP benchmark: names, kinds, profile item fields and labels, and the config defaults they imply.

Constants only, shared by the config and by the readers and writers of the benchmark's files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

LampName = Literal["lamp-1", "lamp-2m", "lamp-2n", "lamp-3", "lamp-4", "lamp-5", "lamp-6", "lamp-7"]
Layout = Literal["official", "oppu"]

GIVEN_FORMATS = ("lamp", "oppu")
"""Values of `data.format` whose files define which rows are queries."""

_MOVIE_TAGS = (
    *("sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia", "dark comedy", "classic"),
    *("psychology", "fantasy", "romance", "thought-provoking", "social commentary", "violence", "true story"),
)
_NEWS_CATEGORIES = (
    *("travel", "education", "parents", "style & beauty", "entertainment", "food & drink", "science & technology"),
    *("business", "sports", "healthy living", "women", "politics", "crime", "culture & arts", "religion"),
)


@dataclass(frozen=True, slots=True)
class LampTask:
    """One task of LaMP.

    Attributes:
        name: name in `data.task`.
        official: name in the benchmark's output files.
        site: folder on the benchmark's site; LaMP-2 is two tasks there, and the plain folder is LaMP-2N (news).
        kind: classification, rating or generation.
        source: the field of a profile item that is a question's input; for LaMP-1 and LaMP-7 no item has it.
        target: the field of a profile item that is a question's output.
        labels: the fixed list of labels, which macro-F1 averages over; empty for generation.
    """

    name: LampName
    official: str
    site: str
    kind: Literal["classification", "rating", "generation"]
    source: str
    target: str
    labels: tuple[str, ...] = ()

    def output_name(self, data_format: str) -> str:
        """Return the task's name in prediction files: OPPU's distinguish the two LaMP-2 tasks, the official do not."""
        return self.official + self.name[6:].upper() if data_format == "oppu" else self.official


LAMP_TASKS: Mapping[str, LampTask] = MappingProxyType(
    {
        task.name: task
        for task in (
            LampTask("lamp-1", "LaMP_1", "LaMP_1", "classification", "title", "citation", ("[1]", "[2]")),
            LampTask("lamp-2m", "LaMP_2", "LaMP_2/new", "classification", "description", "tag", _MOVIE_TAGS),
            LampTask("lamp-2n", "LaMP_2", "LaMP_2", "classification", "text", "category", _NEWS_CATEGORIES),
            LampTask("lamp-3", "LaMP_3", "LaMP_3", "rating", "text", "score", ("1", "2", "3", "4", "5")),
            LampTask("lamp-4", "LaMP_4", "LaMP_4", "generation", "text", "title"),
            LampTask("lamp-5", "LaMP_5", "LaMP_5", "generation", "abstract", "title"),
            LampTask("lamp-6", "LaMP_6", "LaMP_6", "generation", "text", "title"),
            LampTask("lamp-7", "LaMP_7", "LaMP_7", "generation", "source", "text"),
        )
    }
)


def lamp_name(text: str) -> str:
    """Return a task's name in this project's spelling ("LaMP_2M" becomes "lamp-2m"); unknown names are not refused."""
    return text.strip().lower().replace("_", "-")


def lamp_defaults(data: object) -> dict[str, Any]:
    """Return the config defaults implied by the task in the `data` section; an empty dict for data without a task.

    OPPU's files name their test users (101 on some tasks), so all of them are targets. The benchmark's own files need
    not name users: two ids may be the same user, and a query's own row may lie in the profile of the other id.
    Therefore items of queries are excluded from all users' histories.
    """
    if not isinstance(data, dict) or data.get("format") not in GIVEN_FORMATS or not isinstance(data.get("task"), str):
        return {}
    task = LAMP_TASKS.get(lamp_name(data["task"]))
    if task is None:
        return {}
    sections: dict[str, Any] = {"task": {"kind": task.kind}}
    if task.labels:
        sections["task"]["labels"] = list(task.labels)
    oppu = data["format"] == "oppu"
    sections["split"] = {"target_users": 1000, "min_history": 1} if oppu else {"shared_items": "exclude"}
    return sections
