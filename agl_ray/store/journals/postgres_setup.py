"""Connections to PostgreSQL, and the tables there: `connect_arguments`, `migrate`.

Who calls it: `agl_ray.store.journals.postgres` when it opens. Test alone: tests/integration/test_store_postgres_open.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from agl_ray.store.journals.postgres_schema import HEAD, VERSION_TABLE
from agl_ray.types import StoreError

MIGRATIONS = Path(__file__).parent / "migrations"
MIGRATION_LOCK = 4_747_000_001  # any number, the same in every agl_ray
_HEAD_SQL = sa.text(f"SELECT version_num FROM {VERSION_TABLE}")

# A dead peer is noticed within half a minute by either side, so that a lost machine's locks are freed; an abandoned transaction
# is ended; the planner does not compile queries that take milliseconds, and does not join by reading a whole table, which it
# would before it has counted what is in it.
_SESSION = {
    "tcp_keepalives_idle": "15",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "idle_in_transaction_session_timeout": "60s",
    "jit": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
}
_CLIENT: dict[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}


def connect_arguments(url: sa.URL, run_id: str) -> dict[str, Any]:
    """What psycopg gets beside the URL; what the URL says itself goes first."""
    options = " ".join(f"-c {name}={value}" for name, value in _SESSION.items())
    given = url.query.get("options", "")
    plain = "".join(char if " " <= char <= "~" else "?" for char in f"agl-ray store {run_id}")
    ours = {**_CLIENT, "application_name": plain[:60]}
    named = {name: value for name, value in ours.items() if name not in url.query}
    return {**named, "options": f"{options} {given if isinstance(given, str) else ' '.join(given)}"}


async def migrate(engine: AsyncEngine, name: str) -> None:
    """Make the tables, or bring them up to this agl_ray; one run at a time does it. StoreError where they are newer."""
    async with engine.connect() as connection:
        async with connection.begin():
            if await version_of(connection) == HEAD:
                return
        async with connection.begin():
            await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MIGRATION_LOCK)))
            await connection.run_sync(_upgrade, name)


async def version_of(connection: AsyncConnection) -> str | None:
    """Of the tables that are there; None: none are. Within a transaction of the caller's."""
    there = sa.select(sa.func.to_regclass(VERSION_TABLE).isnot(None))
    if not (await connection.execute(there)).scalar_one():
        return None
    return (await connection.execute(_HEAD_SQL)).scalar_one_or_none()


def _upgrade(connection: sa.Connection, name: str) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    known = {step.revision for step in ScriptDirectory.from_config(config).walk_revisions()}
    exists = sa.select(sa.func.to_regclass(VERSION_TABLE).isnot(None))
    version = None
    if connection.execute(exists).scalar_one():
        version = connection.execute(_HEAD_SQL).scalar_one_or_none()
    if version is not None and version not in known:
        raise StoreError(
            f"{name}: its tables are of version {version}, this agl_ray knows versions up to {HEAD}; use the newer agl_ray "
            "that made them, or another database"
        )
    command.upgrade(config, HEAD)
