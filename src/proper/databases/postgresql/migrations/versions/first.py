"""The tables of the first version with PostgreSQL."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "1"
down_revision = None


def upgrade() -> None:
    """Make all tables."""
    _store()
    _log()
    op.create_table("tombstones", sa.Column("name", sa.Text, primary_key=True))
    op.create_table(
        "api_keys",
        sa.Column("sha256", sa.Text, primary_key=True),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("scopes", sa.Text, nullable=False),
        sa.Column("created", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "settings", sa.Column("name", sa.Text, primary_key=True), sa.Column("value", sa.Text, nullable=False)
    )


def _store() -> None:
    op.create_table("facts", sa.Column("key", sa.Text, primary_key=True), sa.Column("value", sa.Text, nullable=False))
    op.create_table(
        "layouts", sa.Column("id", sa.BigInteger, primary_key=True), sa.Column("spec", sa.Text, nullable=False)
    )
    op.create_table(
        "shards", sa.Column("id", sa.BigInteger, primary_key=True), sa.Column("size", sa.BigInteger, nullable=False)
    )
    op.create_table(
        "erasures",
        sa.Column("id", sa.BigInteger, primary_key=True),
        sa.Column("blob", sa.Text, nullable=False),
        sa.Column("offset", sa.BigInteger),
        sa.Column("length", sa.BigInteger),
    )
    op.create_table(
        "records",
        sa.Column("tenant", sa.Text, primary_key=True),
        sa.Column("user", sa.LargeBinary, primary_key=True),
        sa.Column("version", sa.BigInteger, primary_key=True),
        sa.Column("parent", sa.BigInteger),
        sa.Column("tier", sa.Text, nullable=False),
        sa.Column("written", sa.BigInteger, nullable=False),
        sa.Column("facts", sa.Text, nullable=False),
        sa.Column("layout", sa.BigInteger),
        sa.Column("blob", sa.Text),
        sa.Column("offset", sa.BigInteger),
        sa.Column("length", sa.BigInteger, nullable=False),
        sa.Column("xxh3", sa.LargeBinary),
        sa.Column("sha256", sa.LargeBinary),
        sa.Column("embedding", sa.LargeBinary, nullable=False),
    )


def _log() -> None:
    op.create_table(
        "people",
        sa.Column("tenant", sa.Text, primary_key=True),
        sa.Column("user", sa.LargeBinary, primary_key=True),
    )
    op.create_table(
        "interactions",
        sa.Column("number", sa.BigInteger, primary_key=True),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("user", sa.LargeBinary, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("time", sa.Double),
        sa.Column("received", sa.Double, nullable=False),
        sa.UniqueConstraint("tenant", "user", "id"),
    )
    op.create_table(
        "fits",
        sa.Column("tenant", sa.Text, primary_key=True),
        sa.Column("user", sa.LargeBinary, primary_key=True),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("place", sa.BigInteger),
        sa.Column("wanted", sa.BigInteger, nullable=False),
        sa.Column("claim", sa.BigInteger),
        sa.Column("attempts", sa.BigInteger, nullable=False),
        sa.Column("progress", sa.Double, nullable=False),
        sa.Column("phase", sa.Text),
        sa.Column("message", sa.Text),
        sa.Column("version", sa.BigInteger),
        sa.Column("lease", sa.Double),
    )
    op.create_index("fits_by_place", "fits", ["state", "place"])
    op.create_table(
        "counters", sa.Column("name", sa.Text, primary_key=True), sa.Column("value", sa.BigInteger, nullable=False)
    )
    op.create_table(
        "deletions",
        sa.Column("job", sa.Text, primary_key=True),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("user", sa.LargeBinary),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("ended", sa.Double),
    )
    op.create_table(
        "updates",
        sa.Column("number", sa.BigInteger, primary_key=True),
        sa.Column("tenant", sa.Text, nullable=False),
        sa.Column("user", sa.LargeBinary, nullable=False),
        sa.Column("ended", sa.Double, nullable=False),
        sa.Column("base", sa.BigInteger, nullable=False),
        sa.Column("version", sa.BigInteger),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("facts", sa.Text, nullable=False),
    )
    op.create_index("updates_by_user", "updates", ["tenant", "user", "number"])
