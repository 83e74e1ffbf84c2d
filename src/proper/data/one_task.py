"""View of one task's rows in prepared data with several tasks, as a separate data set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from proper.data.database import get_meta, open_read_only
from proper.data.dataset import Dataset

_VIEWS = """
    CREATE TEMP VIEW rows AS SELECT * FROM main.rows WHERE task = {task};
    CREATE TEMP VIEW users AS SELECT u.number, u.id, u.timed,
        (SELECT count(*) FROM rows r WHERE r.user = u.number AND r.part = 'history') AS history,
        (SELECT count(*) FROM rows r WHERE r.user = u.number AND r.part = 'query') AS queries,
        CASE WHEN u.role = 'target' AND EXISTS (SELECT 1 FROM rows r WHERE r.user = u.number AND r.part = 'query')
            THEN 'target' ELSE 'other' END AS role FROM main.users u;"""
"""Views that hide the tables of the same names, so that every statement sees one task's rows alone."""


@contextmanager
def one_task(dataset: Dataset, name: str) -> Iterator[Dataset]:
    """Open the rows of one task alone; its targets are the targets with queries of this task. Row ids are the same.

    Data of one task, whose name is "", is returned itself.
    """
    if not dataset.tasks:
        yield dataset
        return
    path = dataset.connection.execute("SELECT file FROM pragma_database_list WHERE name = 'main'").fetchone()[0]
    connection = open_read_only(Path(path))
    connection.executescript(_VIEWS.format(task=dataset.tasks.index(name)))
    with Dataset(connection) as found:
        found.labels, found.tasks = get_meta(connection, "tasks")[name], ()
        yield found
