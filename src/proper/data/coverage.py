"""Training coverage: queries whose item is in another user's history, and target users that a sample missed."""

from __future__ import annotations

from proper.data.dataset import Dataset
from proper.data.sampling import Sample


def queries_seen_by_others(dataset: Dataset) -> set[int]:
    """Return the ids of queries whose item (or normalized input if there is no item) is in another user's history."""
    found = dataset.connection.execute("""
        SELECT DISTINCT q.id FROM rows h JOIN rows q ON q.item_key = h.item_key AND q.user <> h.user
        WHERE h.part = 'history' AND q.part = 'query'
        UNION
        SELECT DISTINCT q.id FROM rows h JOIN rows q ON q.prompt_key = h.prompt_key AND q.user <> h.user
        WHERE h.part = 'history' AND q.part = 'query' AND q.item_key IS NULL""")
    return {row for (row,) in found}


def targets_outside(dataset: Dataset, sample: Sample) -> set[str]:
    """Return the target users with no row in the sample."""
    found = dataset.connection.execute(f"""
        SELECT id FROM users WHERE role = 'target' AND number NOT IN (
            SELECT r.user FROM {sample.table} s JOIN rows r ON r.id = s.id)""")
    return {user for (user,) in found}
