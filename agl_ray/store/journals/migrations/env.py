"""What Alembic runs to migrate: over the connection, and in the transaction, that `postgres_setup.migrate` gives it."""

from __future__ import annotations

from alembic import context

from agl_ray.store.journals.postgres_schema import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=True,
)
context.run_migrations()
