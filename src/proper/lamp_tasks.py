"""The tasks of LaMP: what each is called, what its items hold, and which labels are allowed.

Facts only, for the config and for whoever reads or writes the benchmark's files. Knows nothing about files, prompts
or rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

LampName = Literal["lamp-1", "lamp-2m", "lamp-2n", "lamp-3", "lamp-4", "lamp-5", "lamp-6", "lamp-7"]
Layout = Literal["official", "oppu"]

GIVEN_FORMATS = ("lamp", "oppu")
"""Formats of `data.format` whose files say themselves which rows are queries."""

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
    """One task.

    Attributes:
        name: as in `data.task`.
        official: as in the benchmark's output files.
        site: its folder on the benchmark's site; LaMP-2 is two tasks there, and the plain folder is the news.
        kind: classification, rating or generation.
        source: the field of a profile item that a question asks about; for LaMP-1 and LaMP-7 no item has it.
        target: the field of a profile item that a question asks for.
        labels: the fixed list of answers, which macro-F1 runs over; empty for generation.
    """

    name: LampName
    official: str
    site: str
    kind: Literal["classification", "rating", "generation"]
    source: str
    target: str
    labels: tuple[str, ...] = ()

    def output_name(self, data_format: str) -> str:
        """Return what prediction files call the task: OPPU's tell the two LaMP-2 apart, the benchmark's do not."""
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
    """Return the task's name in this project's spelling: "LaMP_2M" is "lamp-2m"; an unknown one stays unknown."""
    return text.strip().lower().replace("_", "-")


def lamp_defaults(data: object) -> dict[str, Any]:
    """Return the sections of a config that follow from its `data` section's task; none for other data.

    OPPU's files name their test users (101 on some tasks), so all of them are targets. The benchmark's own need not
    name users: a query's own row may lie in the profile of somebody who is the same person, so what a query asks is
    kept out of everybody's history.
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
