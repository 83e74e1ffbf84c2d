"""Databases of a run: one set of tables and statements (SQLAlchemy Core), in SQLite files or in PostgreSQL."""
