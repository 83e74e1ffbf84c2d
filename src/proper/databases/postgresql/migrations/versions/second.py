"""Erasures with an owner may wait; the records of a blob are found by an index."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "2"
down_revision = "1"


def upgrade() -> None:
    """Add two columns and an index."""
    op.add_column("erasures", sa.Column("tenant", sa.Text))
    op.add_column("erasures", sa.Column("user", sa.LargeBinary))
    op.create_index("records_by_blob", "records", ["blob"])
