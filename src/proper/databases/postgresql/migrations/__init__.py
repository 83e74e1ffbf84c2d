"""Migrations of the PostgreSQL schema with alembic; each module of `versions` is one step.

SQLite files need none so far: their format number has not changed, and missing tables and columns are added.
"""

from __future__ import annotations

from typing import Any

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, text

from proper.databases.location import Location
from proper.errors import StoreError


def migrate(engine: Engine, location: Location) -> None:
    """Bring the tables of a schema, which is the connections' search path, to the newest revision.

    Processes that open the schema at the same time do it one after another.

    Raises:
        StoreError: there is no such schema, or a newer version of the package has migrated it.
    """
    config = Config()
    config.set_main_option("script_location", "proper.databases.postgresql:migrations")
    script = ScriptDirectory.from_config(config)
    with engine.connect() as connection:
        if connection.scalar(text("SELECT current_schema()")) != location.schema:
            raise StoreError(f"{location}: there is no such schema, so the state of the run is lost; restore a backup")
        now, head = MigrationContext.configure(connection).get_current_revision(), script.get_current_head()
    if now == head:
        return
    if now is not None and now not in {step.revision for step in script.walk_revisions()}:
        raise StoreError(f"{location}: a newer version of proper has migrated it (revision {now})")

    def steps(revision: Any, context: MigrationContext) -> Any:
        return script._upgrade_revs("head", revision)

    with EnvironmentContext(config, script, fn=steps) as environment, engine.connect() as connection:
        connection = connection.execution_options(isolation_level="READ COMMITTED")
        environment.configure(connection=connection)
        with environment.begin_transaction():
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext(current_schema()))"))
            environment.run_migrations()
