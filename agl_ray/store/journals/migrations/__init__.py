"""The tables of the PostgreSQL journal, step by step (Alembic). Run by `agl_ray.store.journals.postgres_setup.migrate`."""
