"""Files with rows of several tasks: which task a row is of, and how many rows are of none of a run's tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from proper.config import Config
from proper.data.values import identifier

_SHOWN = 3


@dataclass
class OtherRows:
    """Rows whose task is none of a run's: their number, and the first different names."""

    count: int = 0
    names: dict[str, None] = field(default_factory=dict)

    def add(self, name: str | None) -> None:
        """Count one row."""
        self.count += 1
        if len(self.names) < _SHOWN:
            self.names["null" if name is None else repr(name)] = None


@dataclass
class TaskRows:
    """Rows that one task reads from its files.

    Attributes:
        name: the task.
        column: column with the task of a row; None if every row is of the task.
        names: the tasks that read the same files by the same column.
        counts: whether this is the first task that reads the files: rows that cannot be read, and rows of no task,
            count once.
    """

    name: str = ""
    column: str | None = None
    names: frozenset[str] = frozenset()
    counts: bool = True
    others: OtherRows = field(default_factory=OtherRows)

    def takes(self, row: Mapping[str, object]) -> bool:
        """Return whether a row is of this task; count it if it is of none."""
        if self.column is None:
            return True
        found = _name(row.get(self.column))
        if found == self.name:
            return True
        if self.counts and found not in self.names:
            self.others.add(found)
        return False

    def warning(self, path: str) -> str | None:
        """Return a sentence on the rows of no task; None if there are none."""
        if not self.others.count:
            return None
        rows = f"{self.others.count:,} row{'s are' if self.others.count > 1 else ' is'}"
        return f"{path}: {rows} of no task of this run: column '{self.column}' has {', '.join(self.others.names)}"


def task_rows(config: Config) -> dict[str, TaskRows]:
    """Return what each task of a config reads, by name."""
    files = {name: (one.data.path, one.data.part, one.data.name) for name, one in config.each_task.items()}
    columns = {name: one.data.task_column for name, one in config.each_task.items()}
    read, found = set[tuple[str, str, str | None]](), {}
    for name in files:
        same = frozenset(each for each in files if (files[each], columns[each]) == (files[name], columns[name]))
        found[name] = TaskRows(name, columns[name], same, files[name] not in read)
        read.add(files[name])
    return found


def _name(value: object) -> str | None:
    """Return the task that a cell names: a number as an id is written, so that 1.0 is "1"."""
    try:
        return identifier(value)
    except ValueError:
        return str(value)
